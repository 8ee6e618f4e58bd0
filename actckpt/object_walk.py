"""Walks through what Python objects hold: each object once, each walk with its own idea of what
an object leads to.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def alive(wanted: Callable[[type], bool]) -> list[Any]:
    """Every object of the process whose class is wanted. Takes tens of milliseconds."""
    kinds: dict[type, bool] = {}
    found = []
    for x in gc.get_objects():
        kind = type(x)  # isinstance would wake lazy proxies
        if kind not in kinds:
            kinds[kind] = wanted(kind)
        if kinds[kind]:
            found.append(x)
    return found


def walk(
    roots: Iterable[T],
    parts: Callable[[T], Iterable[T]],
    *,
    of: Callable[[T], Any] = lambda found: found,
    seen: Iterable[object] = (),
    nearest_first: bool = False,
    most: int | None = None,
) -> Iterator[T]:
    """The roots and everything that they lead to, each object once.

    Args:
        parts: what one leads to; asked after it was yielded.
        of: the object of what is yielded, where that says more (by which way it was found).
        seen: objects that are passed over.
        nearest_first: else what was found last comes first.
        most: objects to look at; it ends there.
    """
    waiting = deque(roots)
    take = waiting.popleft if nearest_first else waiting.pop
    # held, so that no other object gets the same id
    known = {id(x): x for x in seen}
    most = None if most is None else most + len(known)
    while waiting and (most is None or len(known) < most):
        found = take()
        x = of(found)
        if id(x) in known:
            continue
        known[id(x)] = x
        yield found
        waiting.extend(parts(found))


def slots(kind: type) -> Iterator[str]:
    """Names of the attributes that objects of a class hold outside of a ``__dict__``."""
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            if name not in ("__dict__", "__weakref__"):
                yield name


def cells(function: types.FunctionType) -> Iterator[tuple[str, types.CellType, Any]]:
    """(name, cell, value) of what a function closes over, as far as it is bound."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell, cell.cell_contents
        except ValueError:
            continue  # not assigned yet


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """Global and attribute names that a function, and those defined in it, refer to."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(n for c in inner for n in names_in(c))]))
