"""The two timelines of a report, as figures and pages show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actckpt.errors import ReportError
from actckpt.pages.palette import COLORS, OTHER
from actckpt.reporting.facts import Arm, Facts, Figures
from actckpt.units import format_bytes, format_percent, format_seconds

Levels = Mapping[str, Sequence[int]]

NOT_ADDED = frozenset(list(COLORS)[:6])
# what is lower than this share of the axis is no wider than a line, and needs no entry
VISIBLE = 0.004


@dataclass(frozen=True, slots=True)
class Panel:
    """One arm.

    Attributes:
        name: "untouched" or "planned"; ``key`` is its name in `Timeline`.
        xs: where its samples lie: in seconds, or in shares of the step where no times are known.
        levels: what is stacked, as far as it is in the report's scope.
        marks: phase -> where it begins, in shares of the samples.
        figures: what it is said to need.
    """

    name: str
    key: str
    xs: Sequence[float]
    levels: Levels
    marks: Mapping[str, float]
    arm: Arm
    figures: Figures

    @property
    def totals(self) -> list[int]:
        """The level at each sample."""
        return [sum(at) for at in zip(*self.levels.values(), strict=True)]

    @property
    def peak_at(self) -> int:
        """The sample at which the level is highest."""
        totals = self.totals
        return totals.index(max(totals))

    def x_of(self, share: float) -> float:
        """The place of a share of the samples."""
        return self.xs[min(int(share * len(self.xs)), len(self.xs) - 1)]

    @property
    def begins(self) -> dict[str, float]:
        """phase -> its place, in the order of the step."""
        # stable: of two phases that begin together (a loss inside the model) the later is last
        placed = sorted(self.marks.items(), key=lambda mark: self.x_of(mark[1]))
        return {name: self.x_of(share) for name, share in placed}


def panels_of(report: Facts) -> tuple[Panel, Panel]:
    """Untouched and planned. Their axes end with the step times that the report states.

    Within a step, an operation has the share of the time that it is predicted to take.

    Raises:
        ReportError: the report has no timeline.
    """
    timeline = report.timeline
    baseline, planned = report.compared
    return (
        _panel(report, "untouched", "baseline", timeline.baseline_s, report.baseline, baseline),
        _panel(report, "planned", "planned", timeline.planned_s, report.planned, planned),
    )


def _panel(
    report: Facts, name: str, key: str, times_s: Sequence[float], arm: Arm, figures: Figures
) -> Panel:
    levels: Levels = getattr(report.timeline, key)
    if report.scope == "activations":
        levels = {name: level for name, level in levels.items() if name not in NOT_ADDED}
    samples = len(next(iter(levels.values()), ()))
    if not samples:
        raise ReportError("this report has no timeline to plot")
    if times_s and times_s[-1] > 0:
        xs = tuple(t * (figures.step_s / times_s[-1]) for t in times_s)
    else:
        xs = tuple(i / max(samples - 1, 1) for i in range(samples))
    marks: Mapping[str, float] = getattr(report.timeline, f"{key}_marks")
    return Panel(name, key, xs, levels, marks, arm, figures)


def title_of(panel: Panel, report: Facts) -> str:
    """What an arm needs, such as ``planned: 1.10 GB, 480 ms a step (+20.0 %)``."""
    bounded = panel.figures.bounded_bytes(report.scope)
    peak = "" if bounded is None else f"{format_bytes(bounded)}, "
    text = f"{panel.name}: {peak}{format_seconds(panel.figures.step_s)} a step"
    return text if panel.name == "untouched" else f"{text} ({format_percent(report.overhead)})"


def has_times(report: Facts) -> bool:
    """Whether both timelines have a time for each sample."""
    return bool(report.timeline.baseline_s and report.timeline.planned_s)


def highest_bytes(panels: Sequence[Panel], report: Facts) -> int:
    """The highest of all levels, the budget and what was measured."""
    return max(
        report.budget_bytes or 0,
        *(max(panel.totals) for panel in panels),
        *(panel.arm.best.bounded_bytes(report.scope) or 0 for panel in panels),
    )


def colors_of(panels: Sequence[Panel]) -> dict[str, str]:
    """category -> colour, in the order of the stack."""
    names = {name for panel in panels for name in panel.levels}
    known = {name: COLORS[name] for name in COLORS if name in names}
    return known | {
        name: OTHER[i % len(OTHER)] for i, name in enumerate(sorted(names - set(known)))
    }


def visible(colors: Mapping[str, str], panels: Sequence[Panel], highest: float) -> list[str]:
    """The categories that are wider than a line somewhere."""
    return [
        name
        for name in colors
        if any(max(panel.levels.get(name, (0,))) > VISIBLE * highest for panel in panels)
    ]
