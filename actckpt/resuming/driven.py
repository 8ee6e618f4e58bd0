"""A run whose loop is a trainer's: an integration says where its passes begin and end.

`Checkpointer.steps` drives the loop itself, and a loop of the user's own is only watched. In
between lies a trainer that goes by counters of its own, which an integration puts back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from actckpt.resuming.checkpointer import Checkpointer
from actckpt.resuming.generators import generators_of
from actckpt.resuming.random_states import gather_random_states, put_random_states


class DrivenLoop:
    """What an integration tells a run of the loop that it sits in.

    Args:
        run: given the loader that the trainer iterates.
        reads_ahead: it reads a batch before it trains on the one before.
    """

    def __init__(self, run: Checkpointer, *, reads_ahead: bool = False) -> None:
        self._progress = run._progress
        self._progress.position.is_driven = True
        self._progress.position.reads_ahead = reads_ahead

    def leaves_pass(self) -> None:
        """No more is read of the pass that gave the last batch; said before the step is counted."""
        self._progress.position.leave()

    def reads(self) -> None:
        """The loop reads the first batch of a pass that it has opened before."""
        loader = self._progress.loader
        if loader is not None:
            self._progress.position.reads(loader)

    def waits(self) -> None:
        """The loader is not opened where it is iterated, until `goes_on_between`.

        For a trainer that iterates once more when the pass begins.
        """
        self._progress.position.is_waiting = True

    def goes_on_within(self) -> None:
        """Puts the random states back once more, where the trainer may have drawn since."""
        self._progress.put_random()

    def goes_on_between(self) -> None:
        """Puts the random states back now, and no more when the next pass begins.

        For what a loop that was resumed between two passes does first and may draw for, such as an
        evaluation.
        """
        self._progress.position.is_waiting = False
        self._progress.put_random()
        self._progress.keep_random()


class RandomBefore:
    """The random states, and those of loaders' generators, from before they are iterated."""

    def __init__(self, loaders: Iterable[Any]) -> None:
        self._generators = generators_of({"loaders": list(loaders)})
        self._states = gather_random_states(), self._generators.states()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Meanwhile they are as they were; after that as they are now."""
        now = gather_random_states(), self._generators.states()
        self._put(self._states)
        try:
            yield
        finally:
            self._put(now)

    def _put(self, states: tuple[dict[str, Any], dict[str, Any]]) -> None:
        put_random_states(states[0])
        self._generators.put(states[1])
