"""Passes over a loader that reads from another, a batch ahead: accelerate's.

The order and the place are those of the loader that it reads from, which it begins with its own
first batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from actckpt.resuming.loaders import is_dispatcher, source_of, workers_of
from actckpt.resuming.passes import AheadOfHandingOut, Pass
from actckpt.resuming.reading import FirstBatch
from actckpt.resuming.watching import Begin, unwatched_iter


def joined(
    loader: Any,
    start: Begin,
    made: Pass,
    pending: dict[str, Any] | None,
    begin_source: Callable[[Begin], Iterator[Any]],
    opening: Callable[[Callable[[Begin], Iterator[Any]]], AbstractContextManager[None]],
) -> Iterator[Any]:
    """The batches of a pass.

    Args:
        start: begins the loader's own iteration.
        pending: the position to go on from.
        begin_source: an iterator over the loader that it reads from, at its place.
        opening: while it is entered, that is how that loader is iterated.
    """
    place = {} if pending is None else pending.get("start") or pending.get("between") or {}
    if place.get("iteration") is not None:
        loader.iteration = place["iteration"]
    iteration = getattr(loader, "iteration", None)
    source = source_of(loader)

    def opened(begin: Begin) -> Iterator[Any]:
        iterator = begin_source(begin)
        assert made.start is not None
        made.start["iteration"] = iteration
        return iterator if workers_of(source) else AheadOfHandingOut(iterator, made)

    def empty() -> None:
        if made.batch and iteration is not None:
            loader.iteration = iteration + 1  # which a pass without a batch does not count

    if pending is not None and pending.get("last") and is_dispatcher(loader):
        # which takes a pass without a batch for an error
        for _ in opened(partial(unwatched_iter, source)):
            pass
        empty()
        return iter(())
    return FirstBatch(start(), opening(opened), empty)
