"""What a plan is predicted to do to a training step, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actckpt.errors import PlanError, ReportError
from actckpt.plan import Plan
from actckpt.reporting.strict_json import document, dumps, fields_of
from actckpt.reporting.table import render_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
MAX_SAMPLES = 400
SUFFIXES = (".json", ".txt", ".png")


@dataclass(frozen=True, slots=True)
class Figures:
    """Peak memory and duration of one training step.

    Args:
        added_bytes: the peak above parameters, buffers, gradients, optimizer state and batch: what
            ``scope="activations"`` bounds. None where it is not known.
    """

    peak_bytes: int
    step_s: float
    added_bytes: int | None = None

    def bounded_bytes(self, scope: str) -> int | None:
        """What a budget of that scope is compared with."""
        return self.added_bytes if scope == "activations" else self.peak_bytes


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the step. ``measured`` is None until steps were measured."""

    predicted: Figures
    measured: Figures | None = None

    @property
    def best(self) -> Figures:
        """The measured figures, or the predicted ones until there are measured ones."""
        return self.measured or self.predicted

    @property
    def peak_bytes(self) -> int:
        """The measured peak, or the predicted one until there is a measured one."""
        return self.best.peak_bytes

    @property
    def step_s(self) -> float:
        """The measured step time, or the predicted one until there is a measured one."""
        return self.best.step_s


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes by category over one predicted step, untouched and planned.

    Args:
        baseline: category -> level at each sample, from the first operation of the step to the
            last; categories stack in the order of the keys, lowest first.
        planned: the same under the plan; it may have another number of samples.
        baseline_s: predicted time at which each sample is taken; empty where it is not known.
        planned_s: the same under the plan.
        baseline_marks: phase -> where it begins, as a share of the samples in [0, 1].
        planned_marks: the same under the plan.
    """

    baseline: dict[str, tuple[int, ...]] = field(default_factory=dict)
    planned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    baseline_s: tuple[float, ...] = ()
    planned_s: tuple[float, ...] = ()
    baseline_marks: dict[str, float] = field(default_factory=dict)
    planned_marks: dict[str, float] = field(default_factory=dict)

    @classmethod
    def downsampled(
        cls,
        baseline: Mapping[str, Sequence[int]],
        planned: Mapping[str, Sequence[int]],
        *,
        baseline_s: Sequence[float] = (),
        planned_s: Sequence[float] = (),
        baseline_marks: Mapping[str, float] | None = None,
        planned_marks: Mapping[str, float] | None = None,
    ) -> Timeline:
        """A timeline of at most 400 samples that keeps both peaks."""
        picked = _instants(baseline), _instants(planned)
        return cls(
            _picked(baseline, picked[0]),
            _picked(planned, picked[1]),
            tuple(float(baseline_s[i]) for i in picked[0]) if baseline_s else (),
            tuple(float(planned_s[i]) for i in picked[1]) if planned_s else (),
            dict(baseline_marks or {}),
            dict(planned_marks or {}),
        )


@dataclass(frozen=True, slots=True)
class RegionRow:
    """One region or burst: what stays for it, what is dropped, operations that run again."""

    label: str
    ops: int
    saved_bytes: int
    dropped_bytes: int
    recompute_s: float
    depth: int


@dataclass(frozen=True, slots=True)
class OpRow:
    """All calls of one operation whose outputs backward needs.

    ``state`` is "saved", "recomputed" or "mixed"; ``bytes`` and ``seconds`` are sums over calls.
    """

    name: str
    count: int
    state: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
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
    """

    policy: str
    plan: Plan
    budget_bytes: int | None
    scope: str
    baseline: Arm
    planned: Arm
    timeline: Timeline = field(default_factory=Timeline)
    regions: tuple[RegionRow, ...] = ()
    ops: tuple[OpRow, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    lower_bound: float | None = None
    lower_bound_of_kind: float | None = None
    certificate: str = ""

    @property
    def gap(self) -> float | None:
        """Percentage points of step time between the predicted overhead and the lower bound."""
        return self._points_above(self.lower_bound)

    @property
    def gap_of_kind(self) -> float | None:
        """The same above what no plan of its kind can beat: what a better planner could gain."""
        return self._points_above(self.lower_bound_of_kind)

    def _points_above(self, bound: float | None) -> float | None:
        if bound is None or not self.baseline.predicted.step_s:
            return None
        predicted = self.planned.predicted.step_s / self.baseline.predicted.step_s - 1
        return 100 * (predicted - bound)

    @property
    def overhead(self) -> float:
        """Planned over baseline step time, minus 1: measured where both were, else predicted."""
        baseline, planned = self.compared
        return planned.step_s / baseline.step_s - 1 if baseline.step_s else 0.0

    @property
    def overhead_measured(self) -> bool:
        """Whether `overhead` compares measured steps."""
        return self.baseline.measured is not None and self.planned.measured is not None

    @property
    def compared(self) -> tuple[Figures, Figures]:
        """(untouched, planned) from one source: measured where both were, else predicted."""
        if self.baseline.measured is not None and self.planned.measured is not None:
            return self.baseline.measured, self.planned.measured
        return self.baseline.predicted, self.planned.predicted

    def __str__(self) -> str:
        return render_report(self)

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
                    "timeline": Timeline(
                        _levels(fields["timeline"]["baseline"]),
                        _levels(fields["timeline"]["planned"]),
                        tuple(fields["timeline"]["baseline_s"]),
                        tuple(fields["timeline"]["planned_s"]),
                        dict(fields["timeline"]["baseline_marks"]),
                        dict(fields["timeline"]["planned_marks"]),
                    ),
                    "regions": tuple(RegionRow(**r) for r in fields["regions"]),
                    "ops": tuple(OpRow(**o) for o in fields["ops"]),
                    "notes": tuple(fields["notes"]),
                    "versions": dict(fields["versions"]),
                }
            )
        except (KeyError, TypeError, PlanError) as error:
            raise ReportError(f"not a report: {error}") from error

    def save(self, path: str | Path) -> Path:
        """The path written: ``.json`` (all of it), ``.txt`` (the table) or ``.png`` (the plot).

        Raises:
            ReportError: another suffix.
        """
        path = Path(path)
        match path.suffix.lower():
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
                    ".json (all data), .txt (the table), .png (the plot)"
                )
        return path

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


def _instants(levels: Mapping[str, Sequence[int]]) -> list[int]:
    """The highest instant of each of at most 400 equal spans."""
    totals = [sum(at) for at in zip(*levels.values(), strict=True)]
    count = min(len(totals), MAX_SAMPLES)
    picked = []
    for i in range(count):
        bucket = range(i * len(totals) // count, (i + 1) * len(totals) // count)
        picked.append(max(bucket, key=totals.__getitem__))
    return picked


def _picked(
    levels: Mapping[str, Sequence[int]], instants: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    # every category is read at the same instants, so that their sum is a real level
    return {name: tuple(int(level[i]) for i in instants) for name, level in levels.items()}


def _levels(data: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(level) for name, level in data.items()}


def _arm_from_json(data: Mapping[str, Any]) -> Arm:
    measured = data["measured"]
    return Arm(Figures(**data["predicted"]), Figures(**measured) if measured else None)
