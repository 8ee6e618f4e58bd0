"""The forward pass cut into segments: a block each, with some of what runs between two of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from itertools import accumulate, pairwise

from actckpt.data.graph import Graph
from actckpt.interpreting.recomputation import Recomputation
from actckpt.policies.blocks import blocks, opened, saved_bytes
from actckpt.policies.solver.structure import numbering

# a block of more than this share of all saved bytes is cut at the calls inside it
_LARGE = 1 / 8

Segment = tuple[int, int]


def segments(possible: Recomputation) -> tuple[Segment, ...]:
    """Operations ``[first, last)`` of each segment, in order, none left out."""
    graph = possible.graph
    begin, end = possible.span
    whole = saved_bytes(graph, 0)
    stages = [graph.stages[s] for s in _fine(graph, blocks(graph), whole)]
    edges = sorted({begin, *(s.first for s in stages), *(s.last for s in stages)})
    crossing = _crossing(possible)
    marks = {begin, end}
    for first in {s.first for s in stages if begin < s.first <= end}:
        marks.add(_thinnest(crossing, edges[bisect_left(edges, first) - 1], first))
    last = max((graph.stages[b].last for b in blocks(graph)), default=end)
    marks.add(last)  # the head and the loss are a segment of their own
    found = sorted(m for m in marks if begin <= m <= end)
    return tuple(pairwise(found))


def _crossing(possible: Recomputation) -> list[int]:
    """Before each operation, the bytes that are read from there on and that nothing saves."""
    graph = possible.graph
    begin, end = possible.span
    last_read: dict[int, int] = {}
    for index in range(begin, end):
        last_read.update(dict.fromkeys(possible.inputs(index), index))
    change = [0] * (end + 1)
    for sid in possible.makers.keys() - possible.saves.keys() - possible.stays:
        storage = graph.storages[sid]
        if storage.born < last_read.get(sid, -1):
            change[storage.born + 1] += storage.bytes
            change[last_read[sid] + 1] -= storage.bytes
    return list(accumulate(change))


def _thinnest(crossing: list[int], first: int, last: int) -> int:
    """Where, between two blocks, the fewest bytes cross that nothing saves anyway: the last such.

    What crosses a boundary is what a segment is made again from; it should be there for free.
    """
    return min(range(last, first - 1, -1), key=crossing.__getitem__)


def _fine(graph: Graph, stages: tuple[int, ...], whole: int) -> list[int]:
    found: list[int] = []
    for stage in stages:
        inner = opened(graph, stage)
        if len(inner) > 1 and saved_bytes(graph, stage) > _LARGE * whole:
            found += [stage, *_fine(graph, inner, whole)]
        else:
            found.append(stage)
    return found


def born_in(possible: Recomputation, segment: Segment) -> list[int]:
    """Activations that a segment makes, in the order of their numbers."""
    storages = possible.graph.storages
    return sorted(s for s in possible.makers if segment[0] <= storages[s].born < segment[1])


def segment_structure(possible: Recomputation, segment: Segment) -> Hashable:
    """A key that two segments share if they run the same operations on tensors of the same shapes.

    What backward needs of them, and in which order, is part of the key; names are not.
    """
    graph = possible.graph
    first, last = segment
    number = numbering(graph)
    ops = tuple(
        (
            op.signature,
            op.random,
            possible.can_run(index) or op.view,
            tuple(number(graph.values[v].storage) for v in op.inputs),
            tuple(number(graph.values[v].storage) for v in op.outputs),
            tuple(number(sid) for sid in op.writes),
        )
        for index, op in enumerate(graph.ops[first:last], first)
    )
    uses = sorted(
        {
            graph.saves[k].first_use
            for s in born_in(possible, segment)
            for k in possible.saves.get(s, ())
        }
    )
    rank = {use: n for n, use in enumerate(uses)}
    saves = tuple(
        (
            number(s),
            possible.source(s) is not None,
            tuple(
                (graph.saves[k].at - first, rank[graph.saves[k].first_use])
                for k in possible.saves.get(s, ())
            ),
        )
        for s in born_in(possible, segment)
    )
    return (ops, saves)
