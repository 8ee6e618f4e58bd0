"""Ranks that train together, and what they do at one and the same step.

One of them alone knows when: of saves that are due by the clock, of the end that a signal asks for.
It says so a step ahead. A rank that ends the next step has exchanged gradients in it with the rank
that said so, which had said it before. What only the step itself shows it says after it, and the
others wait for that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep
from actckpt.errors import CheckpointError
from actckpt.resuming.cadence import Cadence, Every
from actckpt.resuming.choosing import Choice
from actckpt.resuming.choosing_together import TogetherChoice
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.node_directory import NodeDirectory
from actckpt.resuming.places import Places
from actckpt.resuming.run_state import RunState
from actckpt.resuming.shared_directory import SharedDirectory
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.step_names import StepNames

logger = logging.getLogger("actckpt")

# so many steps may one rank be ahead of another
_KEPT = 1000


class Together:
    """The ranks of the default process group; a `Company`."""

    ranked = True

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._end = EndTogether(exchange)
        self._found = _Found(exchange, "better")

    def directory(
        self, path: str, files: Files, keep: Keep, verify: str, *, fresh: bool
    ) -> RunDirectory:
        """As `Company.directory`."""
        return SharedDirectory(path, files, keep, verify, self._exchange, fresh=fresh)

    def choice(self, places: Places, state: RunState) -> Choice:
        """As `Company.choice`."""
        return TogetherChoice(places, state.like, state.model, state.joined)

    def cadence(self, every: Every, mtbf: str) -> Cadence:
        """As `Company.cadence`."""
        return CadenceTogether(every, mtbf, self._exchange)

    def beside(
        self, path: str, keep: Keep, verify: str, main: RunDirectory, number: int, *, fresh: bool
    ) -> RunDirectory:
        """As `Company.beside`."""
        assert isinstance(main, SharedDirectory)
        return NodeDirectory(
            path,
            main.files,
            keep,
            verify,
            self._exchange,
            lambda ticket: f"{main.key(ticket)}/tier-{number}",
            main.journal,
            fresh=fresh,
        )

    def cadence_beside(self, every: Every, number: int) -> Cadence:
        """As `Company.cadence_beside`."""
        return CadenceTogether(every, "24h", self._exchange, f"-{number}")

    @property
    def uploads(self) -> bool:
        """As `Company.uploads`: the coordinator does."""
        return self._exchange.is_coordinator

    def same(self, step: int, found: bool) -> bool:
        """As `Company.same`."""
        return self._found.same(step, lambda: found)

    def ends(self, step: int, *, asked: bool) -> bool:
        """As `Company.ends`."""
        return self._end.comes(step, asked=asked)


class CadenceTogether(Cadence):
    """As `Cadence`; what is not counted in steps, the coordinator's clock or function says.

    Args:
        of: what tells it from those of other places.
    """

    def __init__(self, every: Every, mtbf: str, exchange: Exchange, of: str = "") -> None:
        super().__init__(every, mtbf)
        self._exchange = exchange
        self._turn = _Turn(exchange, f"due{of}")
        self._by_function = callable(every)
        self._found = _Found(exchange, "function")

    def due(self, step: int) -> bool:
        """Whether a save is due after optimizer step number ``step``, on every rank."""
        if self._by_function:
            return self._found.same(step, lambda: Cadence.due(self, step))
        if not self.by_clock:
            return super().due(step)
        return self._turn.comes(step, asked=self._exchange.is_coordinator and super().due(step))


class _Found:
    """What the coordinator finds after a step; the others wait for its word."""

    def __init__(self, exchange: Exchange, what: str) -> None:
        self._exchange = exchange
        self._what = what
        self._names = StepNames()
        self._said: deque[str] = deque()

    def same(self, step: int, find: Callable[[], bool]) -> bool:
        """What the coordinator finds, on every rank; False, and a warning, without its word."""
        exchange = self._exchange
        key = f"{self._what}/{self._names.next(step)}/"
        exchange.begin()
        try:
            if not exchange.is_coordinator:
                return bool(exchange.hear(key, (0,)))
            found = False
            try:
                found = find()
            finally:
                exchange.tell(key, found)
                self._said.append(key)
                if len(self._said) > _KEPT:
                    exchange.forget(self._said.popleft())
            return found
        except CheckpointError as error:
            logger.warning("actckpt: no checkpoint after step %d: %s", step, error)
            return False


class EndTogether:
    """Whether ranks are to save and end, as one of them was asked to."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._said = False
        self._turn = _Turn(exchange, "end")

    def comes(self, step: int, *, asked: bool) -> bool:
        """Whether this step is the last.

        Args:
            asked: this rank was.
        """
        exchange = self._exchange
        key = f"asked/{self._turn.count}"
        if asked and not self._said:
            self._said = True
            exchange.tell(key, exchange.rank)
        somebody = exchange.is_coordinator and exchange.ask(key) is not None
        if not self._turn.comes(step, asked=somebody):
            return False
        # a handler of the user's may let the run go on, until somebody is asked anew
        self._said = False
        return True


class _Turn:
    """A step that the coordinator names; one after another.

    Attributes:
        count: how many have come.
    """

    def __init__(self, exchange: Exchange, key: str) -> None:
        self._exchange = exchange
        self._key = key
        self.count = 0
        self._at: int | None = None

    def comes(self, step: int, *, asked: bool) -> bool:
        key = f"{self._key}/{self.count}"
        if self._at is None and self._exchange.is_coordinator:
            if asked:
                self._at = step + 1
                self._exchange.tell(key, self._at)
        elif self._at is None:
            self._at = self._exchange.ask(key)
        if self._at is None or step < self._at:
            return False
        self._at, self.count = None, self.count + 1
        return True
