"""A stacked timeline: shapes in an SVG that stretches, text in HTML that does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from actckpt.units import format_bytes

# shapes are drawn on a square of this side, and stretched
SIDE = 1000
# a phase narrower than this share of the axis has no room for its name
NARROW = 0.09


@dataclass(frozen=True, slots=True)
class Layer:
    """One band of the stack, from the bottom up."""

    name: str
    color: str
    levels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn.

    Attributes:
        name: by which scripts know it.
        layers: bytes at each sample.
        xs: where the samples lie, ascending, on the same scale as ``width``.
        width: of the axis.
        top_bytes: of the axis.
        ends: text at the left and the right end of the x axis.
        marks: phase -> where it begins.
        budget_bytes: where a line is drawn; None for none.
        measured: (x, bytes) of a point that was measured; None for none.
    """

    name: str
    layers: Sequence[Layer]
    xs: Sequence[float]
    width: float
    top_bytes: float
    ends: tuple[str, str]
    marks: Mapping[str, float] = field(default_factory=dict)
    budget_bytes: int | None = None
    measured: tuple[float, int] | None = None


def draw(chart: Chart) -> str:
    """The chart as HTML."""
    shares = [x / chart.width if chart.width else 0.0 for x in chart.xs]
    places = " ".join(f"{share:.5f}" for share in shares)
    return "\n".join(
        [
            f'<div class="plot" data-arm="{escape(chart.name)}" data-places="{places}" '
            f'tabindex="0" role="img" aria-label="memory of the {escape(chart.name)} step">',
            f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">',
            *_shapes(chart, shares),
            "</svg>",
            *_texts(chart),
            '<div class="cursor" hidden></div></div>',
            f'<div class="ends"><span>{escape(chart.ends[0])}</span>'
            f"<span>{escape(chart.ends[1])}</span></div>",
        ]
    )


def legend(layers: Sequence[Layer]) -> str:
    """The names of the layers with their colours."""
    entries = "".join(
        f'<span><i style="background:{layer.color}"></i>{escape(layer.name)}</span>'
        for layer in layers
    )
    return f'<div class="legend">{entries}</div>'


def ticks(top_bytes: float) -> list[float]:
    """Round levels below ``top_bytes``, three to six of them."""
    if top_bytes <= 0:
        return []
    size = 10.0 ** (len(str(int(top_bytes / 3))) - 1)
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= top_bytes / 6)
    return [step * n for n in range(1, int(top_bytes / step) + 1)]


def _shapes(chart: Chart, shares: Sequence[float]) -> list[str]:
    def points(levels: Sequence[int]) -> list[str]:
        return [
            f"{SIDE * share:.1f},{SIDE * (1 - level / chart.top_bytes):.1f}"
            for share, level in zip(shares, levels, strict=True)
        ]

    lines = []
    for level in ticks(chart.top_bytes):
        y = SIDE * (1 - level / chart.top_bytes)
        lines.append(f'<path class="rule" d="M0,{y:.1f}H{SIDE}"/>')
    floor = [0] * len(shares)
    for layer in chart.layers:
        ceiling = [a + b for a, b in zip(floor, layer.levels, strict=True)]
        path = " ".join([*points(ceiling), *reversed(points(floor))])
        lines.append(f'<path fill="{layer.color}" d="M{path}Z"/>')
        floor = ceiling
    lines.append(f'<path class="edge" d="M{" ".join(points(floor))}"/>')
    for x in list(chart.marks.values())[1:]:
        lines.append(f'<path class="phase" d="M{SIDE * x / (chart.width or 1):.1f},0V{SIDE}"/>')
    if chart.budget_bytes is not None:
        y = SIDE * (1 - chart.budget_bytes / chart.top_bytes)
        lines.append(f'<path class="budget" d="M0,{y:.1f}H{SIDE}"/>')
    return lines


def _texts(chart: Chart) -> list[str]:
    def above(level: float) -> str:
        return f"bottom:{100 * level / chart.top_bytes:.2f}%"

    texts = [
        f'<span class="tick" style="{above(level)}">{format_bytes(level)}</span>'
        for level in ticks(chart.top_bytes)
    ]
    begins = [x / (chart.width or 1) for x in (*chart.marks.values(), chart.width)]
    for n, name in enumerate(chart.marks):
        place = f"left:{100 * begins[n]:.2f}%"
        if begins[n] > 1 - 2 * NARROW:
            place = f"right:{100 * (1 - begins[n]):.2f}%"  # on the other side of its line
        elif begins[n + 1] - begins[n] < NARROW:
            continue
        texts.append(f'<span class="phase" style="{place}">{escape(name)}</span>')
    if chart.budget_bytes is not None:
        texts.append(
            f'<span class="budget" style="{above(chart.budget_bytes)}">'
            f"budget {format_bytes(chart.budget_bytes)}</span>"
        )
    if chart.measured is not None:
        x, level = chart.measured
        texts.append(
            f'<span class="measured" style="left:{100 * x / (chart.width or 1):.2f}%;'
            f'{above(level)}" title="measured {format_bytes(level)}"></span>'
        )
    return texts
