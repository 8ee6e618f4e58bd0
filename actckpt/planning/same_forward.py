"""Whether two traces are of one forward, so that a plan for the one is a plan for the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from actckpt.data.graph import Graph


def grows_residents(before: Graph, now: Graph) -> bool:
    """Whether two traces differ in what is there when the step begins, and none of it is gone.

    Gradients that a backward finds, an optimizer's state and step.
    """
    if before.resident_gradients and not now.resident_gradients:
        return False
    return _resident_bytes(before) <= _resident_bytes(now) and same_forward(before, now)


def same_forward(a: Graph, b: Graph) -> bool:
    """Whether operations, saves and stages until backward begins are the same, shapes included."""
    return all(x == y for x, y in zip_longest(_forward(a), _forward(b)))


def _forward(graph: Graph) -> Iterator[Any]:
    yield graph.device, graph.stands_for, graph.calls
    for op in graph.ops[: graph.forward_end]:
        yield op.name, op.stage, op.phase, op.random, op.asked, graph.signatures[op.signature]
        yield op.inputs, op.outputs
        for value in (graph.values[v] for v in op.outputs):
            yield value.shape, value.stride, value.offset, value.dtype, value.device
    for save in graph.saves:
        yield save.at, save.value, save.stage, save.held
    for stage in graph.stages:
        yield stage.path, stage.call, stage.parent, stage.first, stage.last


def _resident_bytes(graph: Graph) -> int:
    return sum(s.bytes for s in graph.storages if s.born < 0)
