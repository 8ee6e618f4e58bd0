"""The memory of one step over time, untouched beside planned, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from actckpt.errors import ReportError
from actckpt.reporting.facts import Facts
from actckpt.reporting.panels import (
    Panel,
    colors_of,
    has_times,
    highest_bytes,
    panels_of,
    title_of,
    visible,
)
from actckpt.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def draw_report(report: Facts) -> Figure:
    """Two stacked timelines on the same two axes, with the budget and the measured peaks.

    With ``scope="activations"`` only what the step adds is drawn.

    Raises:
        ReportError: the report has no timeline, or matplotlib is not installed.
    """
    panels = panels_of(report)
    figure = blank_figure(10.5, 4.9)
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2, sharey=True, sharex=True, gridspec_kw={"wspace": 0.04})
    highest = highest_bytes(panels, report)
    unit, size = unit_of(highest)
    colors = colors_of(panels)
    in_seconds = has_times(report)
    if report.model:
        figure.suptitle(
            f"{report.model} on {report.device}, policy {report.policy}",
            x=0.01,
            ha="left",
            fontsize=12,
            color=INK,
            fontweight="bold",
        )
    for axes, panel in zip((left, right), panels, strict=True):
        bare_axes(axes)
        axes.set_title(title_of(panel, report), loc="left", fontsize=11, color=INK)
        _draw_levels(axes, panel, colors, size)
        _mark_phases(axes, panel, max(p.xs[-1] for p in panels))
        _mark_budget(axes, report, size, label=axes is right)
        _mark_measured(axes, panel, report.scope, size)
        axes.set_xlabel(
            time_label(report) if in_seconds else "one training step, operation by operation",
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
    shown = visible(colors, panels, highest)
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


def time_label(report: Facts) -> str:
    """What the time axis of a report's figure shows."""
    if report.overhead_measured:
        return "time (s) of a measured step; operations have their predicted shares of it"
    return "predicted time (s)"


def _draw_levels(axes: Axes, panel: Panel, colors: Mapping[str, str], size: float) -> None:
    ordered = [name for name in colors if name in panel.levels]
    axes.stackplot(
        panel.xs,
        [[b / size for b in panel.levels[name]] for name in ordered],
        colors=[colors[name] for name in ordered],
        linewidth=0,
    )
    axes.plot(panel.xs, [t / size for t in panel.totals], color=INK, linewidth=0.8)


def _mark_phases(axes: Axes, panel: Panel, width: float) -> None:
    ordered = [(x, name) for name, x in panel.begins.items()]
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


def _mark_measured(axes: Axes, panel: Panel, scope: str, size: float) -> None:
    measured = panel.arm.measured.bounded_bytes(scope) if panel.arm.measured else None
    if measured is None:
        return
    x = panel.xs[panel.peak_at]
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


def _mark_budget(axes: Axes, report: Facts, size: float, *, label: bool) -> None:
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
