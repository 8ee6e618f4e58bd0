"""The demo's figure: losses that lie on each other, and peaks under their budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actckpt.reporting.figure import BUDGET, INK, MUTED, bare_axes, blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#94a3b8", "#2a78b5", "#f2b45c")


def draw_demo(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss of every arm by step; beside it their measured peaks, budgets and time ratios.

    Args:
        arms: name, losses, peak_bytes, budget_bytes (or None) and time_ratio of each.
    """
    figure = blank_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.25, 1], "wspace": 0.06})
    for axes in (left, right):
        bare_axes(axes)
    _draw_losses(left, arms)
    _draw_peaks(right, arms)
    return figure


def _draw_losses(axes: Axes, arms: Sequence[Mapping[str, Any]]) -> None:
    # equal curves hide each other: the lower ones are drawn wider
    widths = [9.0, 4.5, 1.4]
    for arm, color, width in zip(arms, COLORS, widths, strict=True):
        axes.plot(
            range(1, len(arm["losses"]) + 1),
            arm["losses"],
            color=color,
            linewidth=width,
            solid_capstyle="round",
            solid_joinstyle="round",
            label=arm["name"],
        )
    same = all(arm["losses"] == arms[0]["losses"] for arm in arms)
    verdict = "equal to the last bit" if same else "DIFFERENT"
    axes.set_title(f"loss: {verdict}", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", color=MUTED, fontsize=9)
    axes.set_ylabel("nats per byte", color=MUTED, fontsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_peaks(axes: Axes, arms: Sequence[Mapping[str, Any]]) -> None:
    for x, (arm, color) in enumerate(zip(arms, COLORS, strict=True)):
        peak = arm["peak_bytes"] / 1e6
        axes.bar(x, peak, width=0.62, color=color)
        axes.annotate(
            f"{peak:.0f} MB\n{arm['time_ratio']:.2f} × time",
            (x, 0),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK if color != COLORS[1] else "white",
        )
        if arm["budget_bytes"] is not None:
            budget = arm["budget_bytes"] / 1e6
            axes.plot([x - 0.42, x + 0.42], [budget, budget], color=BUDGET, linewidth=1.8)
            axes.annotate(
                f"budget {budget:.0f} MB",
                (x, budget),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=BUDGET,
                fontweight="bold",
            )
    axes.set_xticks(range(len(arms)), [arm["name"] for arm in arms])
    axes.tick_params(axis="x", labelsize=10, labelcolor=INK)
    axes.set_title("measured peak of a training step", loc="left", fontsize=11, color=INK)
    axes.set_ylabel("allocated memory (MB)", color=MUTED, fontsize=9)
