"""Whether two calls do the same: equal blocks are solved once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import takewhile

from actckpt.data.graph import Graph


def numbering(graph: Graph) -> Callable[[int], tuple[int, bool]]:
    """Names for storages that equal blocks share: the order in which they are first asked for.

    With it whether a storage is resident, as those from before the forward pass are.
    """
    numbers: dict[int, int] = {}

    def number(sid: int) -> tuple[int, bool]:
        resident = sid < 0 or graph.storages[sid].born < 0
        return numbers.setdefault(sid, len(numbers)), resident

    return number


def structure(graph: Graph, stage: int) -> Hashable:
    """A key that two stages share if they run the same operations on tensors of the same shapes.

    The calls inside are part of the key, their names are not.
    """
    s = graph.stages[stage]
    number = numbering(graph)
    ops = tuple(
        (
            op.signature,
            op.random,
            op.stage - stage,
            tuple(number(graph.values[v].storage) for v in op.inputs),
            tuple(number(graph.values[v].storage) for v in op.outputs),
            tuple(number(sid) for sid in op.writes),
        )
        for op in graph.ops[s.first : s.last]
    )
    saves = tuple(
        (save.at - s.first, number(graph.values[save.value].storage), save.held)
        for save in graph.saves[s.first_save : s.last_save]
    )
    calls = tuple(
        (
            *(i - stage, c.parent - stage, c.kind, c.first - s.first, c.last - s.first),
            *(c.refusal, len(c.mutates), tuple(a.source is not None for a in c.inputs)),
        )
        # stages are numbered in the order of their calls: those inside follow
        for i, c in takewhile(
            lambda found: found[1].parent >= stage, enumerate(graph.stages[stage + 1 :], stage + 1)
        )
    )
    return (ops, saves, calls)
