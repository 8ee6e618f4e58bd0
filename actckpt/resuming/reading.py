"""The iterator that whoever trains gets: a loader's own, and what it hands out is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Protocol

from actckpt.resuming.passes import Pass

# who makes passes that end and begin by rules of its own
_DRIVERS = {
    "lightning.pytorch": "Lightning's fit loop",
    "pytorch_lightning": "Lightning's fit loop",
    "transformers.trainer": "the loop of transformers' Trainer",
}


class Listener(Protocol):
    """Whom a pass is told to."""

    @property
    def is_driven(self) -> bool:
        """Whether an integration says where passes begin and end."""

    @property
    def reads_ahead(self) -> bool:
        """Whether whoever iterates reads a batch before it trains on the one before."""

    def asked(self, reading: Reading) -> None:
        """A batch is wanted."""

    def handed_out(self, reading: Reading, batch: Any) -> None:
        """A batch was."""

    def ended(self, reading: Reading) -> None:
        """There are no more."""

    def moved(self, reading: Reading) -> bool:
        """Whether the run was put back since, and the pass goes on from elsewhere."""


class Reading:
    """The batches of one pass.

    Args:
        begin: the pass and its iterator; asked again where the run is put back meanwhile.
    """

    def __init__(self, listener: Listener, begin: Callable[[], tuple[Pass, Iterator[Any]]]) -> None:
        self._listener = listener
        self._begin = begin
        self.made, self._iterator = begin()
        self.driver = _driver() if self.made.watched and not listener.is_driven else ""
        # a batch that was read, and is trained on once the next one was
        self._held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._listener.asked(self)
        if self._listener.moved(self):
            self._held.clear()
            self.made, self._iterator = self._begin()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._hand_out_held()
            self._listener.ended(self)
            raise
        if self._listener.reads_ahead:
            self._hand_out_held()
            self._held.append(batch)
        else:
            self._listener.handed_out(self, batch)
        return batch

    def _hand_out_held(self) -> None:
        while self._held:
            self._listener.handed_out(self, self._held.pop())

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":
            raise AttributeError(name)
        return getattr(self._iterator, name)


class FirstBatch:
    """An iterator that opens something else when its first batch is asked for.

    Args:
        opening: around the first batch.
        empty: called where there is none.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        opening: AbstractContextManager[None],
        empty: Callable[[], None],
    ) -> None:
        self._iterator = iterator
        self._opening: AbstractContextManager[None] | None = opening
        self._empty = empty

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        opening, self._opening = self._opening, None
        if opening is None:
            return next(self._iterator)
        try:
            with opening:
                return next(self._iterator)
        except StopIteration:
            self._empty()
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":
            raise AttributeError(name)
        return getattr(self._iterator, name)


def _driver() -> str:
    """What iterates, where it is known to go by rules of its own; or ""."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        for prefix, name in _DRIVERS.items():
            if module.startswith(prefix):
                return name
        frame = frame.f_back
    return ""
