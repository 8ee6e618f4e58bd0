"""Peak against time, a panel for each model; lower left is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figure import INK, MUTED, OURS, TORCH, UNTOUCHED, bare_axes, blank_figure

Row = Mapping[str, Any]
COMPILE, SELECTIVE, PLANNERS = "#d98e04", "#2e8b6f", "#8b5fbf"
COLUMNS = 3
# name begins with -> (label, color, marker, joined by a line)
LOOKS = {
    "torch per block": ("torch.utils.checkpoint per block", TORCH, "s", False),
    "Hugging Face": ("Hugging Face's switch", TORCH, "+", False),
    "sqrt(n)": ("√n segments", TORCH, "^", False),
    "SAC, all": ("SAC, all products", SELECTIVE, "P", False),
    "SAC, every": ("SAC, every second", SELECTIVE, "X", False),
    "compile": ("torch.compile, budget 1.0 to 0.0", COMPILE, "v", True),
    "sac_ilp": ("sac_ilp", PLANNERS, "D", False),
    "ckptplan": ("ckptplan", PLANNERS, "*", False),
    "Rockmate": ("Rockmate", PLANNERS, "p", False),
}


def draw(rows: Sequence[Row]) -> Figure:
    """The figure of all models in ``rows``."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = min(COLUMNS, len(models))
    lines = -(-len(models) // columns)
    figure = blank_figure(max(4.0 * columns + 0.6, 7), 3.3 * lines + 1.3)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=False).flat)
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, model in zip(panels, models, strict=False):
        _panel(axes, [row for row in rows if row["model"] == model and "peak_bytes" in row])
        axes.set_title(model, loc="left", fontsize=13, color=INK)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.supxlabel("activation peak, % of the untouched model's", fontsize=12, color=MUTED)
    figure.supylabel("step time over the untouched model's", fontsize=12, color=MUTED)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=max(columns + 1, 3),
        frameon=False,
        fontsize=11.5,
        labelcolor=INK,
    )
    return figure


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    bare_axes(axes)
    axes.tick_params(labelsize=10)
    axes.plot(100, 1, marker="o", color=UNTOUCHED, linestyle="none", markersize=5)
    axes.annotate(
        "untouched", (100, 1), (-4, -10), textcoords="offset points", fontsize=9, color=MUTED,
        ha="right",
    )  # fmt: skip
    peaks, measured, predicted = zip(*_ours(rows), strict=True) if rows else ((), (), ())
    axes.plot(peaks, predicted, color=OURS, linewidth=1.2, label="actckpt, predicted", zorder=2)
    axes.plot(
        peaks, measured, color=OURS, marker="o", markersize=5, linestyle="none", label="actckpt",
        zorder=4,
    )  # fmt: skip
    furthest = 100.0
    for start, (label, color, marker, joined) in LOOKS.items():
        points = [_point(row, row) for row in rows if row["peer"].startswith(start)]
        if points:
            axes.plot(
                [x for x, _ in points], [y for _, y in points], color=color, marker=marker,
                markersize=7, linestyle=":" if joined else "none", linewidth=1, label=label,
                alpha=0.9, zorder=3, clip_on=False,
            )  # fmt: skip
            furthest = max(furthest, *(x for x, _ in points))
    axes.set_xlim(0, furthest + 6)
    axes.set_ylim(bottom=min(0.95, axes.get_ylim()[0]))


def _ours(rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """(peak, measured time, predicted time) of our plans, from the lowest peak up."""
    found = {(100.0, 1.0, 1.0)}
    for row in rows:
        for which in ("ours_at_its_peak", "ours_at_its_time"):
            if row[which]["status"] == "measured":
                found.add((*_point(row[which], row), row[which]["predicted"]))
    return sorted(found)


def _point(of: Row, row: Row) -> tuple[float, float]:
    return 100 * of["peak_bytes"] / row["untouched_bytes"], of["over_untouched"]["median"]
