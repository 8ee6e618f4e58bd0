"""What a plan depends on in a graph, as one short text: equal where a plan can be carried over."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from actckpt.data.graph import Graph, Phase

_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|-?\d+e-?\d+")


def plan_key(graph: Graph) -> str:
    """A hash of the step's operations, storages, saves and stages.

    The numbers that an optimizer's operations are given change with every step and are left out,
    and so is what a program takes from the graph at hand: functions to follow, attributes rebound.
    """
    digest = hashlib.blake2b(digest_size=16)
    for line in _lines(graph):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _lines(graph: Graph) -> Iterator[str]:
    changing = {op.signature for op in graph.ops if op.phase == Phase.OPTIMIZER}
    changing -= {op.signature for op in graph.ops if op.phase != Phase.OPTIMIZER}
    yield f"{graph.device} {graph.stands_for} {graph.resident_gradients}"
    for index, text in enumerate(graph.signatures):
        yield _NUMBER.sub("#", text) if index in changing else text
    for s in graph.storages:
        yield f"{s.bytes} {s.category} {s.born} {s.died} {s.settled}"
    for v in graph.values:
        yield f"{v.storage} {v.shape} {v.stride} {v.offset} {v.dtype} {v.device}"
    for op in graph.ops:
        yield f"{op.name} {op.stage} {op.phase} {op.inputs} {op.outputs} {op.writes} {op.signature}"
    for save in graph.saves:
        yield f"{save.at} {save.value} {save.stage} {save.first_use} {save.released} {save.held}"
    for stage in graph.stages:
        yield f"{stage.path} {stage.call} {stage.parent} {stage.first} {stage.last}"
