"""System calls under watch: something else may happen around each of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actckpt.checkpoint.system_calls import OperatingSystem

NAMES = tuple(name for name in vars(OperatingSystem) if not name.startswith("_"))


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that somebody asks for: the how-manieth it is, its name, its arguments."""

    number: int
    name: str
    args: tuple[Any, ...]


Make = Callable[[Call], Any]
Around = Callable[[Call, Make], Any]


class Watched:
    """The real calls, counted, from whichever thread they come.

    Args:
        around: called in place of each; gets the call, and what really makes one.
    """

    def __init__(self, around: Around | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.total = 0
        self._real = OperatingSystem()
        self._around = around
        self._guard = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            with self._guard:
                asked = Call(self.total, name, args)
                self.total += 1
                self.counts[name] += 1
            return self._make(asked) if self._around is None else self._around(asked, self._make)

        call.name = name  # type: ignore[attr-defined] # for the mutants
        return call

    def _make(self, call: Call) -> Any:
        return getattr(self._real, call.name)(*call.args)


def before(act: Callable[[Call], None]) -> Around:
    """Something happens, or is raised, before each call is made."""

    def around(call: Call, make: Make) -> Any:
        act(call)
        return make(call)

    return around


def nested(outer: Around, inner: Around) -> Around:
    """One around the other; the inner sees only the calls that the outer makes."""
    return lambda call, make: outer(call, lambda made: inner(made, make))


class Grudging:
    """Every call is interrupted once, and nothing is read or written but in small pieces."""

    def __init__(self) -> None:
        self.interrupted = 0
        self._fresh = True

    def __call__(self, call: Call, make: Make) -> Any:
        if call.name == "close":  # one that was interrupted has closed, and is not made again
            return make(call)
        self._fresh = not self._fresh
        if not self._fresh:
            self.interrupted += 1
            raise InterruptedError
        if call.name in ("write", "readinto"):
            fd, data, *offset = call.args
            data = data[: 1000 if call.name == "write" else 777]
            call = Call(call.number, call.name, (fd, data, *offset))
        return make(call)
