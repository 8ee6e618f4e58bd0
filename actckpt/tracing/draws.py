"""Draws that decide which parts of a forward run: all as high as can be, or all as low.

A layer is left out where a number drawn is below its probability (LayerDrop), or run where it is
(stochastic depth): under one of the two extremes everything runs. The generators are put into
states from which they draw so, whatever function draws from them.
"""

from __future__ import annotations

import random
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from actckpt.data.graph import Graph

# of the Mersenne twister, which Python, NumPy and torch (on the CPU) all draw from
_WORDS = 624
_VARIED_BITS = 8


class Draws(StrEnum):
    """What random generators give a step that runs on fake tensors."""

    AS_THEY_COME = "as they come"
    HIGH = "all high"
    LOW = "all low"


def steer(draws: Draws) -> None:
    """Puts Python's, NumPy's and torch's generators where they draw so, some 300 times each.

    The lowest bits differ, so that whoever rejects a draw and draws again comes to an end.
    """
    if draws is Draws.AS_THEY_COME:
        return
    varied = np.random.RandomState(0).randint(0, 1 << _VARIED_BITS, _WORDS, dtype=np.uint64)
    high = np.uint64(0xFFFFFFFF >> _VARIED_BITS << _VARIED_BITS)
    words = _untempered(varied | high if draws is Draws.HIGH else varied)
    random.setstate((3, (*(int(w) for w in words), 0), None))
    np.random.set_state(("MT19937", words.astype(np.uint32), 0, 0, 0.0))
    torch.set_rng_state(_torch_state(words))


def _untempered(outputs: Any) -> Any:
    """The twister's state that gives these numbers of 32 bits next."""
    y = outputs ^ (outputs >> np.uint64(18))
    y = y ^ ((y << np.uint64(15)) & np.uint64(0xEFC60000))
    x = y
    for _ in range(5):
        x = y ^ ((x << np.uint64(7)) & np.uint64(0x9D2C5680))
    y = x
    for _ in range(3):
        x = y ^ (x >> np.uint64(11))
    return x & np.uint64(0xFFFFFFFF)


def _torch_state(words: Any) -> torch.Tensor:
    """A state of torch's CPU generator: seed, numbers left, whether seeded, the next, the words."""
    state = torch.Generator().get_state()
    fields = state.numpy()
    fields[8:12].view(np.int32)[0] = _WORDS
    fields[16:24].view(np.uint64)[0] = 0
    fields[24 : 24 + 8 * _WORDS].view(np.uint64)[:] = words
    return state


def asks_for_draws(graph: Graph) -> bool:
    """Whether Python may have gone by numbers that were drawn."""
    if any(stage.generators for stage in graph.stages):
        return True
    drawn: set[int] = set()
    for op in graph.ops[: graph.forward_end]:
        read = {graph.values[v].storage for v in op.inputs}
        if op.random or not read.isdisjoint(drawn):
            drawn.update(graph.values[v].storage for v in op.outputs)
            drawn.update(op.writes)
            if op.asked:
                return True
    return False


def same_course(a: Graph, b: Graph) -> bool:
    """Whether two traces ran the same operations in the same modules and saved as much."""
    return saved_bytes(a) == saved_bytes(b) and _course(a) == _course(b)


def _course(graph: Graph) -> list[tuple[str, str]]:
    ops = graph.ops[: graph.forward_end]
    return [(op.name, graph.stages[op.stage].path if op.stage >= 0 else "") for op in ops]


def saved_bytes(graph: Graph) -> int:
    """What autograd saved, each storage once."""
    saved = {graph.values[s.value].storage for s in graph.saves if not s.held}
    return sum(graph.storages[s].bytes for s in saved if s >= 0)
