"""Where a rank waits for others, for them to see: in which call, in which save.

Ranks that wait for one another in different places wait in vain, however long. One that has waited
for a moment says where it is, and looks where those are that it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

CALL, SAVE = "call", "save"
# called with what is missing, by key who is to say it; what it raises ends the waiting
Look = Callable[[Mapping[str, tuple[int, ...]]], None]


class Voice(Protocol):
    """How a rank talks to others; `Exchange` is it."""

    rank: int
    world_size: int

    @property
    def is_coordinator(self) -> bool: ...
    def begin(self) -> None: ...
    def tell(self, key: str, message: Any) -> None: ...
    def tell_all(self, key: str, message: Any) -> None: ...
    def ask(self, key: str) -> Any: ...
    def hear(self, key: str, ranks: Iterable[int], look: Look | None = None) -> Any: ...
    def hear_all(self, key: str, look: Look | None = None) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank is.

    Args:
        key: what it waits to hear.
        what: for messages: "resume()", "a save of step 3".
        ranks: whose word it lacks.
        save: which save it is in.
    """

    key: str
    what: str
    ranks: tuple[int, ...]
    save: str = ""


class Whereabouts:
    """What ranks say of where they are."""

    def __init__(self, exchange: Voice) -> None:
        self._exchange = exchange
        self._said: dict[str, Place] = {}

    def say(self, kind: str, place: Place) -> None:
        """This rank is there, in the thread that trains (`CALL`) or in the one that saves."""
        if self._said.get(kind) != place:
            self._said[kind] = place
            self._exchange.tell(f"at/{kind}/{self._exchange.rank}", asdict(place))

    @contextmanager
    def left(self, kind: str) -> Iterator[None]:
        """After the block this rank is no longer where it said."""
        try:
            yield
        finally:
            if self._said.pop(kind, None) is not None:
                # not deleted: who has just seen that there is a word waits until it has it
                self._exchange.tell(f"at/{kind}/{self._exchange.rank}", None)

    def of(self, kind: str, awaited: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, Place]]:
        """Where those are that still have not said what this rank waits for.

        Args:
            awaited: by key, who is to say it.
        """
        for key, ranks in awaited.items():
            for rank in self._others(ranks):
                said = self._exchange.ask(f"at/{kind}/{rank}")
                # asked again: it may have gone there after it said what was missing before
                if said is not None and self._exchange.ask(key) is None:
                    yield rank, Place(**{**said, "ranks": tuple(said["ranks"])})

    def _others(self, ranks: Iterable[int]) -> Iterator[int]:
        return (rank for rank in ranks if rank != self._exchange.rank)
