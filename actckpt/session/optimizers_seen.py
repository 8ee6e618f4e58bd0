"""What is known of one optimizer, and what a plan was made for of all of them."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from actckpt.data.graph import Category, Graph
from actckpt.object_walk import alive
from actckpt.tracing.optimizers import is_optimizer
from actckpt.tracing.optimizing import Optimizing

_SIZED = (list, dict, deque, defaultdict)


@dataclass(slots=True)
class Accounted:
    """What a plan was made for: which optimizers, stepping when, with how much state.

    ``optimizers`` is None where it serves whatever steps. ``sizes`` are those seen to be covered.
    """

    optimizers: frozenset[Any] | None
    state_bytes: int
    sizes: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, optimizers: frozenset[Any], graph: Graph) -> Accounted:
        """What a graph that was traced with them accounts for."""
        state = (s.bytes for s in graph.storages if s.category is Category.OPTIMIZER)
        return cls(optimizers, sum(state))


class SeenOptimizer:
    """One optimizer of the model. What was only seen is held weakly: the loop may drop it."""

    def __init__(self, number: int, optimizer: Any, *, given: bool) -> None:
        self.number = number
        self.ref = weakref.ref(optimizer)
        self.given = optimizer if given else None
        self.foreseen = self.told = False
        self.in_backward = False
        self.frees: bool | None = None
        self.temporary_bytes: int | None = None
        self.steps = 0
        self.tries = 0

    def optimizing(self, frees: bool) -> Optimizing | None:
        """The optimizer and when it steps; None if it is gone.

        Args:
            frees: whether it lets go of its gradients, as far as that was not seen.
        """
        optimizer = self.ref()
        if optimizer is None:
            return None
        _, in_backward, freed, temporary_bytes = self.key(frees)
        return Optimizing(optimizer, in_backward, freed, temporary_bytes)

    def key(self, frees: bool) -> tuple[int, bool, bool, int | None]:
        """What a plan depends on."""
        freed = self.in_backward and (frees if self.frees is None else self.frees)
        return self.number, self.in_backward, freed, self.temporary_bytes


def items_in(optimizer: Any) -> int:
    """Changes whenever something is added to an optimizer, or taken out; quick."""
    state = getattr(optimizer, "state", {})
    size = sum([len(x) for x in vars(optimizer).values() if type(x) in _SIZED])
    try:
        return sum(map(len, state.values()), size)
    except TypeError:
        return len(state) + size


def optimizers_alive() -> list[Any]:
    """Every optimizer of the process. Takes tens of milliseconds."""

    def may_be_one(kind: type) -> bool:
        steps = callable(getattr(kind, "step", None)) and not issubclass(kind, type)
        return steps and (issubclass(kind, Optimizer) or hasattr(kind, "param_groups"))

    return [x for x in alive(may_be_one) if is_optimizer(x)]
