"""Figures of one look for every experiment."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1f2937"
MUTED = "#6b7280"
GRID = "#e5e7eb"
OURS = "#c0392b"
TORCH = "#2a78b5"
UNTOUCHED = "#4a5568"


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches, that belongs to no window."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def bare_axes(axes: Axes) -> None:
    """Take the box from ``axes``; leave light lines."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
