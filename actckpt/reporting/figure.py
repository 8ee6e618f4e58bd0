"""The memory of one step over time, untouched beside planned, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actckpt.errors import ReportError
from actckpt.graph import Category
from actckpt.units import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from actckpt.reporting.report import Arm, Report

Levels = Mapping[str, Sequence[int]]

# what no plan can change in greys and violet, what it can in colour; lowest in the stack first
COLORS: dict[str, str] = {
    Category.PARAMETER: "#4a5568",
    Category.BUFFER: "#718096",
    Category.OPTIMIZER: "#94a3b8",
    Category.BATCH: "#c3cedb",
    Category.CONSTANT: "#dbe2ea",
    Category.GRADIENT: "#8b7bb8",
    Category.ACTIVATION: "#2a78b5",
    "saved": "#2a78b5",
    "recomputed": "#58b09c",
    "temporaries": "#f2b45c",
    "workspace": "#f7d794",
}
NOT_ADDED = frozenset(list(COLORS)[:6])
OTHER = ("#a3a3a3", "#bdbdbd", "#d4d4d4")
INK = "#1f2937"
MUTED = "#6b7280"
BUDGET = "#c0392b"
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and to no global state.

    Args:
        width: in inches, like ``height``.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("plots need matplotlib: pip install 'actckpt[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def bare_axes(axes: Axes) -> None:
    """Take the box from ``axes``; leave light horizontal lines."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def unit_of(highest_bytes: float) -> tuple[str, float]:
    """The name and size of the unit in which an axis up to ``highest_bytes`` reads best."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((name, size) for name, size in units if highest_bytes >= size), ("B", 1.0))


@dataclass(frozen=True, slots=True)
class _Panel:
    """One arm: where its samples lie on the x axis, what is stacked there, where phases begin."""

    name: str
    xs: Sequence[float]
    levels: Levels
    marks: Mapping[str, float]
    arm: Arm

    @property
    def totals(self) -> list[int]:
        return [sum(at) for at in zip(*self.levels.values(), strict=True)]

    def x_of(self, share: float) -> float:
        """The place of a share of the samples."""
        return self.xs[min(int(share * len(self.xs)), len(self.xs) - 1)]


def draw_report(report: Report) -> Figure:
    """Two stacked timelines on the same two axes, with the budget and the measured peaks.

    With ``scope="activations"`` only what the step adds is drawn.

    Raises:
        ReportError: the report has no timeline, or matplotlib is not installed.
    """
    panels = _panels(report)
    figure = blank_figure(10.5, 4.8)
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2, sharey=True, sharex=True, gridspec_kw={"wspace": 0.04})
    highest = max(
        report.budget_bytes or 0,
        *(max(panel.totals) for panel in panels),
        *(panel.arm.best.bounded_bytes(report.scope) or 0 for panel in panels),
    )
    unit, size = unit_of(highest)
    colors = _colors([name for panel in panels for name in panel.levels])
    in_seconds = bool(report.timeline.baseline_s and report.timeline.planned_s)
    for axes, panel in zip((left, right), panels, strict=True):
        bare_axes(axes)
        axes.set_title(_title(panel, report), loc="left", fontsize=11, color=INK)
        _draw_levels(axes, panel, colors, size)
        _mark_phases(axes, panel, max(p.xs[-1] for p in panels))
        _mark_budget(axes, report, size, label=axes is right)
        _mark_measured(axes, panel, report.scope, size)
        axes.set_xlabel(
            "predicted time (s)" if in_seconds else "one training step, operation by operation",
            color=MUTED,
            fontsize=9,
        )
    if not in_seconds:
        left.set_xticks([])
    left.set_xlim(0, max(panel.xs[-1] for panel in panels) or 1)
    left.set_ylim(0, 1.16 * highest / size)
    left.yaxis.set_major_locator(MaxNLocator(6))
    what = "added by the step" if report.scope == "activations" else "allocated"
    left.set_ylabel(f"memory {what} ({unit})", color=MUTED, fontsize=9)
    # a category that would be no wider than a line needs no entry
    shown = [
        name
        for name in colors
        if any(max(panel.levels.get(name, (0,))) > 0.004 * highest for panel in panels)
    ]
    figure.legend(
        handles=[Patch(color=colors[name], label=name) for name in shown],
        loc="outside lower center",
        ncols=max(min(len(shown), 9), 1),
        frameon=False,
        fontsize=9,
        handlelength=1.0,
        handleheight=1.0,
        labelcolor=INK,
    )
    return figure


def _panels(report: Report) -> list[_Panel]:
    timeline = report.timeline
    panels = []
    for name, levels, times_s, marks, arm in (
        (
            "untouched",
            timeline.baseline,
            timeline.baseline_s,
            timeline.baseline_marks,
            report.baseline,
        ),
        ("planned", timeline.planned, timeline.planned_s, timeline.planned_marks, report.planned),
    ):
        in_scope = _in_scope(levels, report.scope)
        samples = len(next(iter(in_scope.values()), ()))
        if not samples:
            raise ReportError("this report has no timeline to plot")
        xs = times_s or tuple(i / max(samples - 1, 1) for i in range(samples))
        panels.append(_Panel(name, xs, in_scope, marks, arm))
    return panels


def _in_scope(levels: Levels, scope: str) -> Levels:
    if scope != "activations":
        return levels
    return {name: level for name, level in levels.items() if name not in NOT_ADDED}


def _title(panel: _Panel, report: Report) -> str:
    baseline, planned = report.compared
    figures = baseline if panel.arm is report.baseline else planned
    bounded = figures.bounded_bytes(report.scope)
    peak = "" if bounded is None else f"{format_bytes(bounded)}, "
    text = f"{panel.name}: {peak}{format_seconds(figures.step_s)} a step"
    return text if figures is baseline else f"{text} ({format_percent(report.overhead)})"


def _draw_levels(axes: Axes, panel: _Panel, colors: Mapping[str, str], size: float) -> None:
    ordered = [name for name in colors if name in panel.levels]
    axes.stackplot(
        panel.xs,
        [[b / size for b in panel.levels[name]] for name in ordered],
        colors=[colors[name] for name in ordered],
        linewidth=0,
    )
    axes.plot(panel.xs, [t / size for t in panel.totals], color=INK, linewidth=0.8)


def _mark_phases(axes: Axes, panel: _Panel, width: float) -> None:
    # stable: of two phases that begin together (a loss inside the model) the later one is named
    ordered = sorted(
        ((panel.x_of(share), name) for name, share in panel.marks.items()), key=lambda mark: mark[0]
    )
    ends = [x for x, _ in ordered[1:]] + [width]
    for i, ((x, name), end) in enumerate(zip(ordered, ends, strict=True)):
        at_edge = i == len(ordered) - 1 and x > 0.85 * width
        if not at_edge and end - x < 0.013 * len(name) * width:
            continue  # too narrow for its name
        if i:
            axes.axvline(x, color=INK, linewidth=0.7, linestyle=(0, (1, 2)))
        axes.annotate(
            name,
            (x, 1.0),
            xycoords=axes.get_xaxis_transform(),
            fontsize=8,
            color=MUTED,
            xytext=(-4 if at_edge else 4, -2),
            textcoords="offset points",
            va="top",
            ha="right" if at_edge else "left",
        )


def _mark_measured(axes: Axes, panel: _Panel, scope: str, size: float) -> None:
    measured = panel.arm.measured.bounded_bytes(scope) if panel.arm.measured else None
    if measured is None:
        return
    totals = panel.totals
    x = panel.xs[totals.index(max(totals))]
    axes.plot(
        [x],
        [measured / size],
        marker="D",
        color="white",
        markeredgecolor=INK,
        markersize=6,
        zorder=5,
        clip_on=False,
    )
    axes.annotate(
        f"measured {format_bytes(measured)}",
        (x, measured / size),
        xytext=(9, 9),
        textcoords="offset points",
        ha="left",
        fontsize=8,
        color=INK,
        bbox=LABEL_BOX,
        zorder=4,
    )


def _mark_budget(axes: Axes, report: Report, size: float, *, label: bool) -> None:
    if report.budget_bytes is None:
        return
    axes.axhline(report.budget_bytes / size, color=BUDGET, linewidth=1.4, linestyle=(0, (5, 2)))
    if label:
        axes.annotate(
            f"budget {format_bytes(report.budget_bytes)}",
            (1.0, report.budget_bytes / size),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 5),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=BUDGET,
            fontweight="bold",
            bbox=LABEL_BOX,
        )


def _colors(names: Sequence[str]) -> dict[str, str]:
    known = [name for name in COLORS if name in set(names)]
    unknown = sorted(set(names) - set(known))
    return {name: COLORS[name] for name in known} | {
        name: OTHER[i % len(OTHER)] for i, name in enumerate(unknown)
    }
