"""Solvers side by side: what runs outside Python uses every core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# each has a solver's memory, and HiGHS keeps threads of its own for each
_MOST = 8


def in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, in their order; the answers do not depend on the cores there are.

    Args:
        calls: that release the interpreter's lock, as HiGHS does, and share nothing they change.
    """
    width = min(_MOST, len(calls), _cores())
    if width <= 1:
        return [call() for call in calls]
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(lambda call: call(), calls))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
