"""What searches for plans of one graph have in common, whatever the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.pricing.simulate import Pricer

T = TypeVar("T")

# graphs: a step's, and the same without what is resident
_MOST = 2


class Prepared:
    """A graph's pricer, and whatever searches make of it that does not depend on a budget."""

    def __init__(self, graph: Graph, profile: Profile) -> None:
        self.graph = graph
        self.profile = profile
        self.pricer = Pricer(graph, profile)
        self._made: dict[Callable[[Prepared], Any], Any] = {}

    def is_of(self, graph: Graph, profile: Profile) -> bool:
        """Whether it is that of a step and its costs."""
        same = self.graph is graph and self.profile is profile
        return same or (self.graph == graph and self.profile == profile)

    def once(self, make: Callable[[Prepared], T]) -> T:
        """What a function makes of it; made when it is first asked for."""
        if make not in self._made:
            self._made[make] = make(self)
        found: T = self._made[make]
        return found


_KEPT: ContextVar[list[Prepared] | None] = ContextVar("kept", default=None)


@contextmanager
def kept_tables() -> Iterator[None]:
    """Searches for plans inside it share what does not depend on the budget.

    For several budgets of one step: tables are made for the first, and let go of at the end. They
    take up to some hundred MB. Inside another one it changes nothing.
    """
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set([])
    try:
        yield
    finally:
        _KEPT.reset(token)


def prepared(graph: Graph, profile: Profile) -> Prepared:
    """What belongs to a step: what is kept, or new."""
    kept = _KEPT.get()
    for found in kept or ():
        if found.is_of(graph, profile):
            return found
    made = Prepared(graph, profile)
    if kept is not None:
        kept.append(made)
        del kept[:-_MOST]
    return made
