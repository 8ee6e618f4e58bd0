"""Ways that a search chose among, for the next search that is about the same forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from actckpt.data.plan import Burst, Region

# bursts that together drop something
Way = tuple[Burst, ...]

# more are hardly ever of use, and each has to be priced again
_MOST = 400


class HandedOn:
    """What one search is given, and what it leaves.

    Attributes:
        given: ways of an earlier search of the same forward, () where there was none.
        left: the ways that this search chose among, the best first.
    """

    def __init__(self, given: Sequence[Way]) -> None:
        self.given = tuple(given)
        self.left: tuple[Way, ...] = ()


_HANDED: ContextVar[HandedOn | None] = ContextVar("handed on", default=None)


@contextmanager
def handing_on(given: Sequence[Way] = ()) -> Iterator[HandedOn]:
    """Searches inside it begin with some ways; ``left`` is what the last of them chose among.

    A step with more resident has the same ways to recompute and other prices of memory: with the
    ways at hand a search is some rounds, not all of them.
    """
    handed = HandedOn(given)
    token = _HANDED.set(handed)
    try:
        yield handed
    finally:
        _HANDED.reset(token)


def ways_given() -> tuple[Way, ...]:
    """The ways that a search may begin with."""
    handed = _HANDED.get()
    return () if handed is None else handed.given


def leave_ways(parts: Iterable[tuple[Region, ...] | Way]) -> None:
    """Hands on what choices consist of, the best first; of bursts alone."""
    handed = _HANDED.get()
    if handed is not None:
        ways = (tuple(p for p in of_choice if isinstance(p, Burst)) for of_choice in parts)
        handed.left = tuple(itertools.islice(ways, _MOST))
