"""The lower convex hull of a trade between bytes and seconds, found slope by slope."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

# trades beyond that many are too close to each other to matter
MAX_TRADES = 8


class Point(Protocol):
    """A choice with what it costs."""

    @property
    def kept(self) -> Hashable: ...

    @property
    def bytes(self) -> int: ...

    @property
    def time_s(self) -> float: ...


P = TypeVar("P", bound=Point)


def lower_hull(least: P, most: P, solve: Callable[[float], P | None]) -> list[P]:
    """Points of the hull between two ends, fewest bytes first.

    Args:
        least: of the fewest bytes.
        most: of the least time.
        solve: seconds that a byte costs -> the best choice at that price.

    References:
        Eisner and Severance 1976, Mathematical techniques for efficient record segmentation
        (the parametric search).
    """
    found = {least.kept: least, most.kept: most}
    todo = [(least, most)]
    while todo and len(found) < MAX_TRADES:
        a, b = todo.pop(0)
        if b.bytes <= a.bytes or a.time_s <= b.time_s:
            continue
        between = solve((a.time_s - b.time_s) / (b.bytes - a.bytes))
        if between is not None and between.kept not in found:
            found[between.kept] = between
            todo += [(a, between), (between, b)]
    return sorted(found.values(), key=lambda t: (t.bytes, t.time_s))
