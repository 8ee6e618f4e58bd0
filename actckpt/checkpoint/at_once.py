"""The same work on several shares, in as many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def at_once(work: Callable[[S], T], shares: Sequence[S]) -> list[T]:
    """The results in the order of the shares, once all have ended; one is done by the caller.

    No executor: those of `concurrent.futures` take no work once the interpreter exits, when a save
    in the background still goes on.

    Raises:
        BaseException: what the first share failed with that failed.
    """
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(k: int) -> None:
        try:
            results[k] = work(shares[k])
        except BaseException as error:
            errors[k] = error

    threads = [
        threading.Thread(target=run, args=(k,), name="actckpt-share") for k in range(1, len(shares))
    ]
    mine = [0]
    for k, thread in enumerate(threads, 1):
        try:
            thread.start()
        except RuntimeError:  # there may be no further one, or the interpreter ends
            mine.append(k)
    for k in mine:
        run(k)
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[k] for k in range(len(shares))]
