"""System calls that count, fail, do less, or are interrupted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from actckpt.checkpoint.system_calls import OperatingSystem

NAMES = tuple(name for name in vars(OperatingSystem) if not name.startswith("_"))
Before = Callable[[int, str, tuple[Any, ...]], None]


class Watched:
    """The real calls, with something done before or after each.

    Args:
        before: called with the number of the call, its name and arguments; may raise.
        after: the same, once the call was made.
    """

    def __init__(self, before: Before | None = None, after: Before | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.total = 0
        self._real = OperatingSystem()
        self._before = before
        self._after = after

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            number, self.total = self.total, self.total + 1
            self.counts[name] += 1
            if name == "close":  # a descriptor is gone even where closing it reports an error
                self._real.close(*args)
            if self._before is not None:
                self._before(number, name, args)
            result = None if name == "close" else getattr(self._real, name)(*args)
            if self._after is not None:
                self._after(number, name, args)
            return result

        return call


class Grudging(Watched):
    """Every call is interrupted once, and nothing is read or written but in small pieces."""

    def __init__(self) -> None:
        super().__init__(self._interrupt)
        self.interrupted = 0
        self._fresh = True

    def _interrupt(self, number: int, name: str, args: tuple[Any, ...]) -> None:
        self._fresh = not self._fresh
        # a close that was interrupted has closed, and is not made again
        if not self._fresh and name != "close":
            self.interrupted += 1
            raise InterruptedError

    def write(self, fd: int, data: memoryview) -> int:
        return int(self.__getattr__("write")(fd, data[:1000]))

    def readinto(self, fd: int, buffer: memoryview) -> int:
        return int(self.__getattr__("readinto")(fd, buffer[:777]))


def failing(at: int, code: int) -> Before:
    """Raises at one call, for `Watched`."""

    def fail(number: int, name: str, args: tuple[Any, ...]) -> None:
        if number == at:
            raise OSError(code, os.strerror(code), str(args[0]))

    return fail
