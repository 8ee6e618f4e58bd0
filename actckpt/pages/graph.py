"""A traced step as a fragment for notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from actckpt.pages.chart import Chart, Layer, draw, legend
from actckpt.pages.markup import Cell, fragment, table
from actckpt.pages.palette import COLORS
from actckpt.units import format_bytes

# rows of the table of operations, and points of the timeline
MOST_ROWS = 8
MOST_POINTS = 400


class Step(Protocol):
    """What is drawn of a `Graph`: its fields of the same names."""

    @property
    def device(self) -> str: ...

    @property
    def stands_for(self) -> str: ...

    @property
    def ops(self) -> Sequence[Any]: ...

    @property
    def stages(self) -> Sequence[Any]: ...

    @property
    def storages(self) -> Sequence[Any]: ...

    @property
    def values(self) -> Sequence[Any]: ...

    @property
    def saves(self) -> Sequence[Any]: ...


def graph_fragment(graph: Step) -> str:
    """How large a step is, what it saves for backward, and its memory operation by operation."""
    counts = f"{len(graph.ops)} operations in {len(graph.stages)} calls of modules"
    place = f"{graph.device}, for {graph.stands_for}" if graph.stands_for else graph.device
    saved = _saved(graph)
    total = format_bytes(sum(size for _, size in saved.values()))
    largest = sorted(saved.items(), key=lambda item: -item[1][1])
    rows: list[list[Cell | str]] = [
        [name, Cell(str(count), count), Cell(format_bytes(size), size)]
        for name, (count, size) in largest[:MOST_ROWS]
    ]
    if rest := largest[MOST_ROWS:]:
        count, size = sum(c for _, (c, _) in rest), sum(s for _, (_, s) in rest)
        rows.append([f"… {len(rest)} more", Cell(str(count)), Cell(format_bytes(size))])
    return fragment(
        f"<p>One training step on {place}: {counts}; autograd saves {total} for backward.</p>",
        table(["saved for backward, made by", "tensors", "bytes"], rows),
        *_timeline(graph),
    )


def _saved(graph: Step) -> dict[str, tuple[int, int]]:
    """operation -> (storages, bytes) that autograd saves of what it makes."""
    storages = {graph.values[save.value].storage for save in graph.saves if not save.held}
    counts, sizes = Counter[str](), Counter[str]()
    for sid in storages:
        storage = graph.storages[sid]
        if sid >= 0 and storage.born >= 0:
            name = graph.ops[storage.born].name.removeprefix("aten.").removesuffix(".default")
            counts[name] += 1
            sizes[name] += storage.bytes
    return {name: (counts[name], sizes[name]) for name in counts}


def _timeline(graph: Step) -> list[str]:
    levels = _levels(graph)
    totals = [sum(at) for at in zip(*levels.values(), strict=True)]
    if not totals:
        return []
    count = min(len(totals), MOST_POINTS)
    spans = [(i * len(totals) // count, (i + 1) * len(totals) // count) for i in range(count)]
    at = [max(range(*span), key=totals.__getitem__) for span in spans]
    layers = [
        Layer(name, COLORS[name], [levels[name][i] for i in at])
        for name in COLORS
        if any(levels.get(name, ()))
    ]
    begins: dict[str, float] = {}
    for i, op in enumerate(graph.ops):
        begins.setdefault(str(op.phase), i)
    highest = max(totals)
    chart = Chart(
        name="untouched",
        layers=layers,
        xs=at,
        width=len(totals) - 1 or 1,
        top_bytes=1.16 * highest or 1,
        ends=("first operation", "last"),
        marks=begins,
    )
    return [
        f'<figure class="arm"><figcaption>untouched: {format_bytes(highest)} without the scratch '
        f"inside kernels</figcaption>{draw(chart)}</figure>",
        legend(layers),
    ]


def _levels(graph: Step) -> dict[str, list[int]]:
    """category -> level when each operation had run."""
    count = len(graph.ops)
    ends = [s.died for s in graph.storages]
    for save in graph.saves:
        sid = graph.values[save.value].storage
        if sid >= 0:
            ends[sid] = max(ends[sid], save.released)
    changes: dict[str, list[int]] = {}
    for storage, end in zip(graph.storages, ends, strict=True):
        begin, end = max(storage.born, 0), min(end, count)
        if end > begin:
            change = changes.setdefault(str(storage.category), [0] * (count + 1))
            change[begin] += storage.bytes
            change[end] -= storage.bytes
    return {name: list(accumulate(change))[:count] for name, change in changes.items()}
