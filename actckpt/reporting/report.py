"""What a plan is predicted to do to a training step, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actckpt.data.plan import Plan
from actckpt.errors import PlanError, ReportError
from actckpt.reporting.facts import Arm, Facts, Figures, OpRow, PeakRow, RegionRow
from actckpt.reporting.strict_json import document, dumps, fields_of
from actckpt.reporting.table import render_report
from actckpt.reporting.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
SUFFIXES = (".html", ".json", ".txt", ".png")


@dataclass(frozen=True, slots=True)
class Report(Facts):
    """The plan in force, what it was predicted to cost and what it was measured to cost.

    Args:
        budget_bytes: the bound on the peak, or None where a policy was applied without one.
        scope: "step" (the whole step's peak) or "activations" (what the step adds).
        baseline: the untouched model.
        planned: the model under the plan.
        notes: what the bound does not cover, and which stages were refused and why.
        lower_bound: overhead that no plan within the budget can beat, as predicted; None without a
            budget.
        lower_bound_of_kind: the same of plans of its kind: by operations, or by calls.
        certificate: what the lower bound rests on.
        model: name of the model's class, "" where it is not known.
        at_peak: what the planned step's predicted peak is made of, the largest first.
    """

    def __str__(self) -> str:
        return render_report(self)

    __repr__ = __str__  # a notebook shows the table

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `Report.from_json` reads it back equal."""
        return document("report", FORMAT_VERSION, {**asdict(self), "overhead": self.overhead})

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Report:
        """The report that `to_json` or ``save("x.json")`` wrote.

        Raises:
            ReportError: the data is no report, or of a version that is not known here.
        """
        fields = fields_of("report", FORMAT_VERSION, data)
        fields.pop("overhead", None)
        try:
            return cls(
                **{
                    **fields,
                    "plan": Plan.from_json(fields["plan"]),
                    "baseline": _arm_from_json(fields["baseline"]),
                    "planned": _arm_from_json(fields["planned"]),
                    "timeline": Timeline.from_json(fields["timeline"]),
                    "at_peak": tuple(PeakRow(**r) for r in fields.get("at_peak", ())),
                    "regions": tuple(RegionRow(**r) for r in fields["regions"]),
                    "ops": tuple(OpRow(**o) for o in fields["ops"]),
                    "notes": tuple(fields["notes"]),
                    "versions": dict(fields["versions"]),
                }
            )
        except (KeyError, TypeError, PlanError) as error:
            raise ReportError(f"not a report: {error}") from error

    def save(self, path: str | Path) -> Path:
        """The path written, by its suffix.

        ``.html`` is one page that fetches nothing, ``.json`` all of the data, ``.txt`` the table,
        ``.png`` the plot.

        Raises:
            ReportError: another suffix.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".html":
                from actckpt.reporting.page import report_page

                path.write_text(report_page(self, self.to_json()), encoding="utf-8")
            case ".json":
                path.write_text(dumps(self.to_json()), encoding="utf-8")
            case ".txt":
                path.write_text(f"{self}\n", encoding="utf-8")
            case ".png":
                self.plot(path)
            case suffix:
                raise ReportError(
                    f"cannot save a report as {path.name!r}: "
                    f"{f'suffix {suffix!r}' if suffix else 'no suffix'} is not one of "
                    ".html (a page), .json (all data), .txt (the table), .png (the plot)"
                )
        return path

    def _repr_html_(self) -> str:
        """What a notebook shows: the figures and both timelines."""
        from actckpt.reporting.page import report_fragment

        return report_fragment(self)

    def scalars(self, prefix: str = "actckpt/") -> dict[str, float]:
        """The report's numbers by name, for whatever keeps track of experiments.

        Peaks and what the step adds are in bytes, times in seconds; ``overhead``, ``budget_used``
        and ``lower_bound`` are shares (0.1 is 10 %), ``gap_points`` percentage points. What is not
        known is left out.

        Args:
            prefix: before every name.
        """
        found: dict[str, float | None] = {"budget_bytes": self.budget_bytes}
        for arm, of in (("untouched", self.baseline), ("planned", self.planned)):
            for source, figures in (("predicted", of.predicted), ("measured", of.measured)):
                if figures is not None:
                    found[f"{arm}_{source}_peak_bytes"] = figures.peak_bytes
                    found[f"{arm}_{source}_added_bytes"] = figures.added_bytes
                    found[f"{arm}_{source}_step_s"] = figures.step_s
        bounded = self.planned.best.bounded_bytes(self.scope)
        if self.budget_bytes and bounded is not None:
            found["budget_used"] = bounded / self.budget_bytes
        found |= {
            "overhead": self.overhead,
            "lower_bound": self.lower_bound,
            "gap_points": self.gap,
            "regions": len(self.regions),
            "recompute_s": sum(region.recompute_s for region in self.regions),
        }
        return {
            # the solver's numbers are numpy's, which some trackers refuse
            f"{prefix}{name}": value if type(value) is int else float(value)
            for name, value in found.items()
            if value is not None
        }

    def plot(self, path: str | Path | None = None) -> Figure:
        """Both memory timelines as a matplotlib figure, written to ``path`` if there is one.

        Raises:
            ReportError: matplotlib is not installed, or the report has no timeline.
        """
        from actckpt.reporting.figure import draw_report

        figure = draw_report(self)
        if path is not None:
            figure.savefig(path)
        return figure


def _arm_from_json(data: Mapping[str, Any]) -> Arm:
    measured = data["measured"]
    return Arm(Figures(**data["predicted"]), Figures(**measured) if measured else None)
