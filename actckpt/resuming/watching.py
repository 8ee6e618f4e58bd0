"""Iteration of a loader that somebody else iterates, told to whom it concerns.

Python looks for ``__iter__`` in an object's class. So the loader gets a class of its own, derived
from the one that it had: of the same name, for that loader alone, until nobody watches any more.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

Begin = Callable[[], Iterator[Any]]
_ORIGINAL = "_actckpt_original_class"
# what `object` says of a class, whatever the class itself says
_CLASS: Any = object.__dict__["__class__"]


def watch(loader: Any, opener: Callable[[Any, Begin], Iterator[Any]]) -> Callable[[], None] | None:
    """Has ``opener(loader, begin)`` called wherever ``iter(loader)`` is.

    Args:
        opener: a method; its object is not kept alive by this. ``begin`` begins the iteration
            that would have begun.

    Returns:
        What ends it; None where it cannot be done, and nothing was.
    """
    original = type(loader)
    if not hasattr(loader, "__dict__") or not hasattr(original, "__iter__"):
        return None
    watcher = weakref.WeakMethod(opener)
    watched: Any = None

    def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
        begin: Begin = super(watched, self).__iter__
        tell = watcher()
        return begin() if tell is None else tell(self, begin)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        """A copy, here or in another process, is a loader as it was."""
        reduced = super(watched, self).__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        kinds = (original if a is watched else a for a in arguments)
        return (original if function is watched else function, tuple(kinds), *rest)

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            __slots__=(),
            __iter__=__iter__,
            __reduce_ex__=__reduce_ex__,
        )
        namespace[_ORIGINAL] = original
        if "__class__" not in _names_of(original):
            # who asks the object itself is told what it was told before
            namespace["__class__"] = property(lambda _: original)

    try:
        watched = types.new_class(original.__name__, (original,), exec_body=fill)
        _CLASS.__set__(loader, watched)
    except TypeError:  # a class that allows no other, or no other layout
        return None
    alive = weakref.ref(loader) if hasattr(original, "__weakref__") else lambda: loader

    def unwatch() -> None:
        nonlocal watcher
        watcher = lambda: None  # type: ignore[assignment] # noqa: E731
        here = alive()
        if here is not None and type(here) is watched:
            _CLASS.__set__(here, original)

    return unwatch


def _names_of(kind: type) -> set[str]:
    """What the classes say that a class derives from, but for `object`."""
    return {name for base in kind.__mro__[:-1] for name in vars(base)}


def unwatched_iter(loader: Any) -> Iterator[Any]:
    """``iter(loader)`` that nobody is told of."""
    kind = type(loader)
    while _ORIGINAL in vars(kind):
        kind = vars(kind)[_ORIGINAL]
    return iter(loader) if kind is type(loader) else kind.__iter__(loader)
