"""What ranks decide together, in calls that each of them makes in the thread that trains.

Every question is known by its name. What a rank asks or answers alone is nobody else's answer, and
ranks that are in different calls, each waiting for the other, are told so, all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from actckpt.errors import CheckpointError
from actckpt.sharded.whereabouts import CALL, SAVE, Place, Voice, Whereabouts


class RanksApartError(CheckpointError):
    """Ranks are in different calls."""


class Calls:
    """The calls of one run, on one rank.

    Attributes:
        saves: keys of the saves that this rank has come to, or has declined.
        refused: of saves of other ranks that cannot come to anything, why.
    """

    def __init__(self, exchange: Voice) -> None:
        self._exchange = exchange
        self._whereabouts = Whereabouts(exchange)
        # they begin anew once ranks were apart
        self._round = 0
        self._counts: Counter[str] = Counter()
        # what this rank has said its part to
        self._answered: set[str] = set()
        self.saves: set[str] = set()
        self.refused: dict[str, str] = {}

    # ---- calls

    def question(self, call: str) -> str:
        """What `tell` is to answer, once this rank, the coordinator, has decided.

        Raises:
            RanksApartError: another rank was in another call.
        """
        return self._next(call, "told")

    def tell(self, question: str, message: Any) -> None:
        """Says what this rank has decided; the others ask `hear`."""
        self._answered.add(question)
        self._exchange.tell(question, message)

    def hear(self, call: str) -> Any:
        """What the coordinator has decided.

        Raises:
            RanksApartError: ranks are in different calls.
            CheckpointError: as `Exchange.hear`.
        """
        here = Place(self._next(call, "told"), call, (0,))
        with self._whereabouts.left(CALL):
            return self._exchange.hear(here.key, (0,), lambda missing: self._look(here, missing))

    def gather(self, call: str, message: Any) -> list[Any]:
        """What every rank says in this call, in their order.

        Raises:
            RanksApartError: ranks are in different calls.
            CheckpointError: as `Exchange.hear_all`.
        """
        return self.gather_at(self._next(call, "said"), call, message)

    def place(self, call: str) -> str:
        """What `gather_at` is to be given in this call, with more behind it.

        Raises:
            RanksApartError: ranks are in different calls.
        """
        return self._next(call, "in")

    def gather_at(self, key: str, call: str, message: Any) -> list[Any]:
        """As `gather`, where ranks say more than once what is to be told from all else.

        Raises:
            RanksApartError: ranks are in different calls.
            CheckpointError: as `Exchange.hear_all`.
        """
        exchange = self._exchange
        exchange.begin()
        here = Place(key, call, tuple(range(exchange.world_size)))
        self._answered.add(key)
        exchange.tell_all(key, message)
        with self._whereabouts.left(CALL):
            return exchange.hear_all(key, lambda missing: self._look(here, missing))

    def _next(self, call: str, how: str) -> str:
        self._raise_if_apart()
        self._counts[call] += 1
        return f"met/{self._round}/{call}/{self._counts[call]}/{how}"

    def _raise_if_apart(self) -> None:
        said = self._exchange.ask(f"apart/{self._round}")
        if said is not None:
            self._round += 1
            self._counts.clear()
            raise RanksApartError(said)

    def _look(self, here: Place, missing: Mapping[str, tuple[int, ...]]) -> None:
        """Raises if this rank waits in vain."""
        self._raise_if_apart()
        self._whereabouts.say(CALL, here)
        for rank, there in self._whereabouts.of(CALL, missing):
            if there.key != here.key and self._is_waited_for(there):
                self._say_apart({self._exchange.rank: here.what, rank: there.what})
                self._raise_if_apart()
        if self._exchange.is_coordinator:
            # it makes no call before its own saves have ended: nobody comes to one of theirs
            for rank, there in self._whereabouts.of(SAVE, missing):
                if self._is_unattended(there):
                    self._refuse(there, apart({0: here.what, rank: there.what}))

    def _is_waited_for(self, there: Place) -> bool:
        """Whether another rank waits there for this one, and has not been told that it may leave.

        One that was told may take a while to hear it.
        """
        return (
            self._exchange.rank in there.ranks
            and there.key not in self._answered
            and there.key.startswith(f"met/{self._round}/")
            and self._exchange.ask(f"apart/{self._round}") is None
        )

    def _is_unattended(self, there: Place) -> bool:
        """Whether another rank is in a save that this one has not come to, nor given up."""
        return there.save not in self.saves and there.save not in self.refused

    def _say_apart(self, calls: Mapping[int, str]) -> None:
        self._exchange.tell(f"apart/{self._round}", apart(calls))

    # ---- saves

    def begin_save(self, save: str) -> None:
        """This rank, the coordinator, comes to a save.

        Raises:
            RanksApartError: it has said before that it would not.
        """
        self.saves.add(save)
        if save in self.refused:
            raise RanksApartError(self.refused[save])

    def hear_in_save(self, key: str, save: str, what: str) -> Any:
        """What the coordinator says to this rank in a save; ``failed`` where it will not come.

        Args:
            what: the save is, for messages.

        Raises:
            CheckpointError: as `Exchange.hear`.
        """
        here = Place(key, what, (0,), save)
        with self._whereabouts.left(SAVE):
            return self._exchange.hear(key, (0,), lambda missing: self._whereabouts.say(SAVE, here))

    def hear_all_in_save(self, key: str, what: str) -> list[Any]:
        """What every rank says in a save to this one, the coordinator.

        Raises:
            RanksApartError: one of them is in another save, or in a call.
            CheckpointError: as `Exchange.hear_all`.
        """

        def look(missing: Mapping[str, tuple[int, ...]]) -> None:
            for rank, there in self._whereabouts.of(SAVE, missing):
                if self._is_unattended(there):
                    text = apart({0: what, rank: there.what})
                    self._refuse(there, text)
                    raise RanksApartError(text)
            for rank, there in self._whereabouts.of(CALL, missing):
                if self._is_waited_for(there):
                    calls = {0: what, rank: there.what}
                    self._say_apart(calls)
                    raise RanksApartError(apart(calls))

        return self._exchange.hear_all(key, look)

    def _refuse(self, there: Place, text: str) -> None:
        """Says to a rank that nobody comes to its save, now or later."""
        self.refused[there.save] = text
        self._exchange.tell(there.key, {"failed": text})


def apart(calls: Mapping[int, str]) -> str:
    """That ranks are in different calls."""
    where = " and ".join(f"rank {rank} is in {what}" for rank, what in sorted(calls.items()))
    return (
        f"the ranks do different things, and would wait for each other: {where}. Every rank has to "
        "make the same calls in the same order, and to save at the same steps"
    )
