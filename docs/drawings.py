"""Draws docs/figures: `python docs/drawings.py`. The step of README is planned for its figure.

Each drawing is 420 units wide, so that its letters can be read on a phone. Its colours are those
of the system's scheme, and of the reader's choice on the site (docs/style.css).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FIGURES = Path(__file__).parent / "figures"
WIDTH = 420
STYLE = """<style>
.actckpt-drawing { --ink: #1f2328; --soft: #818b98; --card: #eef1f5; --calls: #2f6fde;
  --ops: #c93c37; --kept: #b6bec9; }
@media (prefers-color-scheme: dark) { .actckpt-drawing { --ink: #e6edf3; --soft: #9198a1;
  --card: #2a2f3a; --calls: #6ea8ff; --ops: #ff7b72; --kept: #596273; } }
.actckpt-drawing text { fill: var(--ink); font: 13px system-ui, sans-serif; }
.actckpt-drawing .soft { fill: var(--soft); font-size: 12px; }
.actckpt-drawing .strong { font-weight: 600; }
.actckpt-drawing .mid { text-anchor: middle; }
.actckpt-drawing .end { text-anchor: end; }
.actckpt-drawing .card { fill: var(--card); }
.actckpt-drawing .kept { fill: var(--kept); }
.actckpt-drawing .soon { fill: var(--card); }
.actckpt-drawing .later { fill: var(--soft); }
.actckpt-drawing .calls { fill: var(--calls); }
.actckpt-drawing .ops { fill: var(--ops); }
.actckpt-drawing .rule { stroke: var(--soft); fill: none; }
.actckpt-drawing .dash { stroke-dasharray: 4 4; }
.actckpt-drawing .line { fill: none; stroke-width: 2; }
.actckpt-drawing .line.kept { stroke: var(--soft); fill: none; }
.actckpt-drawing .line.calls { stroke: var(--calls); fill: none; }
.actckpt-drawing .line.ops { stroke: var(--ops); fill: none; }
</style>"""


def svg(height: float, title: str, *parts: str) -> str:
    """A drawing of that height."""
    return "\n".join(
        [
            f'<svg class="actckpt-drawing" xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {WIDTH} {height:.0f}">',
            f"<title>{title}</title>",
            STYLE,
            *parts,
            "</svg>",
        ]
    )


def text(x: float, y: float, says: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{says}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 6) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{radius}" class="{kind}"/>'
    )


def path(points: str, kind: str) -> str:
    return f'<path d="{points}" class="{kind}"/>'


def arrow(x: float, y: float, to: float) -> str:
    """Straight down."""
    return path(f"M{x} {y}V{to} m-4 -6 l4 6 l4 -6", "rule")


def flow() -> str:
    """From a model to a plan that is in force."""
    rows = [
        ("your model, one batch", "", "trace", "the real code, on fake tensors: no memory"),
        (
            "Graph",
            "operations, storages, what is saved",
            "profile",
            "each distinct operation, once",
        ),
        ("Profile", "seconds and scratch of each", "policy", "what to keep, what to run again"),
        ("Plan", "what is recomputed, and when", "price", "peak and time, without running"),
        ("the changed model", "once more on fake tensors", "dry run", "does it fit?"),
        ("the same model object", "trains inside the budget", "", ""),
    ]
    parts, top, high, gap = [], 6.0, 44.0, 40.0
    places = []
    for name, says, step, how in rows:
        places.append(top)
        parts.append(box(40, top, 250, high, "card"))
        parts.append(text(165, top + (26 if not says else 19), name, "strong mid"))
        if says:
            parts.append(text(165, top + 36, says, "soft mid"))
        if step:
            parts.append(arrow(60, top + high, top + high + gap - 2))
            parts.append(text(72, top + high + 25, step, "strong"))
            parts.append(text(72 + 9 * len(step), top + high + 25, how, "soft"))
        top += high + gap
    back, up = places[4] + high / 2, places[3] + high / 2
    parts.append(path(f"M290 {back}H330V{up}H292 m6 -4 l-6 4 l6 4", "rule dash"))
    parts.append(text(338, (back + up) / 2 - 2, "no: plan", "soft"))
    parts.append(text(338, (back + up) / 2 + 14, "for less", "soft"))
    return svg(top - gap + 6, "From a model to a plan in force", *parts)


Bar = tuple[int, float, float, str]  # row, from, to, kind
FORWARD, BACKWARD, AGAIN_BY_CALLS, AGAIN_BY_OPERATIONS = "soon", "later", "calls", "ops"


def lifetimes(title: str, slots: Sequence[str], bars: Sequence[Bar]) -> str:
    """What lives when: time to the right in slots, one row for each result of the forward."""
    left, top, row = 70.0, 40.0, 18.0
    rows = 1 + max(bar[0] for bar in bars)
    slot = (WIDTH - left - 6) / len(slots)
    parts = [
        text(left - 8, 33, "runs", "soft end"),
        text(left, 14, "forward", "soft"),
        text(left + 8 * slot, 14, "backward", "soft"),
    ]
    parts += [
        text(left - 8, top + 13 + row * i, f"result {i + 1}", "soft end") for i in range(rows)
    ]
    for place, begin, end, kind in bars:
        x, y = left + begin * slot, top + 3 + row * place
        parts.append(box(x, y, (end - begin) * slot - 1, row - 5, kind, 3))
    foot = top + row * rows
    held = [sum(1 for b in bars if b[1] < i + 0.5 < b[2]) for i in range(len(slots))]
    for i, kind in enumerate(slots):
        parts.append(box(left + i * slot, 22, slot - 1, 12, kind, 2))
        high = 50 * held[i] / 8
        parts.append(box(left + i * slot, foot + 66 - high, slot - 1, high, "kept", 0))
    line = foot + 66 - 50 * max(held) / 8
    parts.append(path(f"M{left} {line}H{WIDTH - 6}", "rule dash"))
    parts.append(text(left - 8, foot + 66, "held", "soft end"))
    parts.append(text(left - 8, line + 4, f"{max(held)} at most", "soft end"))
    again = sum(1 for kind in slots if kind in (AGAIN_BY_CALLS, AGAIN_BY_OPERATIONS))
    parts.append(text(WIDTH - 6, 14, f"{again or 'none'} run again", "soft end"))
    return svg(foot + 74, title, *parts)


def untouched() -> str:
    """Everything is kept from forward to backward."""
    slots = [FORWARD] * 8 + [BACKWARD] * 8
    bars: list[Bar] = [(i, i, 16 - i, "kept") for i in range(8)]
    return lifetimes("Without a plan: every result waits for backward", slots, bars)


def by_calls() -> str:
    """Two regions of four: each is run again as a whole."""
    again = [AGAIN_BY_CALLS] * 3 + [BACKWARD] * 4
    bars: list[Bar] = [(0, 0, 22, "kept"), (4, 4, 15, "kept")]
    bars += [(i, i, i + 1, "kept") for i in (1, 2, 3, 5, 6, 7)]
    bars += [(5 + i, 8 + i, 14 - i, "calls") for i in range(3)]
    bars += [(1 + i, 15 + i, 21 - i, "calls") for i in range(3)]
    return lifetimes(
        "By calls: a region runs again as a whole", [FORWARD] * 8 + again + again, bars
    )


def by_operations() -> str:
    """Four are kept; each of the others is made again just before it is needed."""
    slots = [FORWARD] * 8
    bars: list[Bar] = []
    for i in range(7, -1, -1):
        if i % 2 == 0:
            slots.append(BACKWARD)
            bars.append((i, i, len(slots), "kept"))
        else:
            slots += [AGAIN_BY_OPERATIONS, BACKWARD]
            bars += [(i, i, i + 1, "kept"), (i, len(slots) - 2, len(slots), "ops")]
    return lifetimes("By operations: one result at a time, just before it is needed", slots, bars)


def commit() -> str:
    """How a checkpoint is written."""
    rows = [
        ("copy", "the state, in memory"),
        ("write", "all files, under another name"),
        ("sync", "every file is on the device"),
        ("manifest", "sizes and checksums, last"),
        ("read back", "every byte, compared"),
        ("rename", "one call; folder synced"),
        ("retire", "only now do older ones go"),
    ]
    parts, top, high, gap = [], 26.0, 32.0, 12.0
    parts.append(text(WIDTH - 2, 14, "killed here, a resume finds", "soft end"))
    for i, (name, says) in enumerate(rows):
        parts.append(box(2, top, 280, high, "card"))
        parts.append(text(10, top + 20, name, "strong"))
        parts.append(text(88, top + 20, says, "soft"))
        if i + 1 < len(rows):
            parts.append(arrow(20, top + high, top + high + gap))
        top += high + gap
    first, after = 26.0, 26.0 + 6 * (high + gap)
    parts.append(path(f"M290 {first}h6V{after - gap}h-6", "rule"))
    parts.append(text(304, (first + after) / 2 - 12, "the checkpoint", ""))
    parts.append(text(304, (first + after) / 2 + 6, "before, whole", ""))
    parts.append(path(f"M290 {after}h6v{high}h-6", "rule"))
    parts.append(text(304, after + 21, "this one, whole", ""))
    return svg(top, "How a checkpoint is written", *parts)


def curve(
    times: Sequence[float], heights: Sequence[float], kind: str, scale: tuple[float, ...]
) -> str:
    """A line through (seconds, bytes), thinned to one point a pixel."""
    left, wide, foot, per_s, per_byte = scale
    points, last = [], -1.0
    for at, high in zip(times, heights, strict=True):
        x, y = left + at * per_s * wide, foot - high * per_byte
        if x - last >= 0.8 or not points:
            points.append(f"{x:.1f} {y:.1f}")
            last = x
    return path("M" + "L".join(points), f"line {kind}")


def step() -> str:
    """README's step, untouched and under its budget: memory over time, as predicted."""
    import torch

    import actckpt

    layer = torch.nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
    model = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 6), torch.nn.Linear(128, 1))
    batch, budget_gb = torch.randn(8, 128, 128), 0.06
    actckpt.optimize(model, budget_gb, batch=batch, loss_fn=lambda out: out.mean())
    report = actckpt.report(model)
    timeline = report.to_json()["timeline"]
    arms = {"baseline": "kept", "planned": "ops"}
    levels = {arm: [sum(at) for at in zip(*timeline[arm].values(), strict=True)] for arm in arms}
    seconds = {arm: timeline[f"{arm}_s"] for arm in arms}
    high, longest = max(levels["baseline"]), max(s[-1] for s in seconds.values())
    left, top, tall = 62.0, 20.0, 170.0
    scale = (left, WIDTH - left - 8, top + tall, 1 / longest, tall / high)
    line = top + tall - budget_gb * 1e9 * tall / high
    parts = [
        path(f"M{left} {top}V{top + tall}H{WIDTH - 8}", "rule"),
        path(f"M{left} {line}H{WIDTH - 8}", "rule dash"),
        text(WIDTH - 8, line - 5, f"budget {budget_gb * 1e3:.0f} MB", "soft end"),
        text(left - 6, top + 10, f"{high / 1e6:.0f} MB", "soft end"),
        text(left - 6, top + tall, "0", "soft end"),
    ]
    for arm, kind in arms.items():
        parts.append(curve(seconds[arm], levels[arm], kind, scale))
    foot = top + tall + 18
    slower = 100 * (longest / seconds["baseline"][-1] - 1)
    parts += [
        text(left, foot, "forward", "soft"),
        text(WIDTH - 8, foot, "backward", "soft end"),
        path(f"M{left} {foot + 18}h22", "line kept"),
        text(left + 30, foot + 22, f"untouched: {high / 1e6:.0f} MB"),
        path(f"M{left} {foot + 38}h22", "line ops"),
        text(
            left + 30,
            foot + 42,
            f"planned: {max(levels['planned']) / 1e6:.0f} MB, {slower:.0f} % slower (predicted)",
        ),
    ]
    return svg(foot + 52, "Memory over one training step, untouched and planned", *parts)


DRAWINGS = {
    "flow": flow,
    "untouched": untouched,
    "by-calls": by_calls,
    "by-operations": by_operations,
    "commit": commit,
    "step": step,
}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
