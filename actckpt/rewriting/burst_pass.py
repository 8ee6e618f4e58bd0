"""One way back through the bursts of a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from actckpt.rewriting.bursting import Views
from actckpt.rewriting.schedule import BurstProgram, Schedule


class Pass:
    """What one backward over a run has had made again.

    Attributes:
        keeps: the bursts are going to be run once more, and what they read is kept.
        alone: only the holder that is asked is filled.
        bursts: those that are going to be run.
        done: bursts that have been run.
        handed: what they hand to those inside them, until the last has taken it.
    """

    __slots__ = ("alone", "bursts", "done", "handed", "keeps", "takers")

    def __init__(
        self,
        schedule: Schedule,
        asked: Iterable[int] | None = None,
        keeps: bool = False,
        alone: bool = False,
    ) -> None:
        """
        Args:
            asked: the bursts that are going to be asked, or what they take something from is; None
                for all.
        """
        self.keeps = keeps
        self.alone = alone
        self.done: set[int] = set()
        self.handed: dict[int, dict[int, Views]] = {}
        self.takers: dict[tuple[int, int], int]
        if asked is None:
            self.bursts = set(range(len(schedule.bursts)))
            self.takers = dict(schedule.takers)
            return
        self.bursts = set()
        todo = list(asked)
        while todo:
            burst = todo.pop()
            if burst not in self.bursts:
                self.bursts.add(burst)
                todo.extend(giver for _, giver in schedule.bursts[burst].taken)
        self.takers = Counter(
            (giver, sid) for b in self.bursts for sid, giver in schedule.bursts[b].taken
        )

    def awaits(self, burst: int) -> bool:
        """Whether a burst is going to be run, and has not been."""
        return burst in self.bursts and burst not in self.done

    def taken_by(self, burst: BurstProgram) -> None:
        """A burst has run, and had what it takes."""
        for sid, giver in burst.taken:
            self.takers[(giver, sid)] -= 1
            if not self.takers[(giver, sid)]:
                self.handed[giver].pop(sid, None)
