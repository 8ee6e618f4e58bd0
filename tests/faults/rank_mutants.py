"""Saves of many ranks broken on purpose, to see that it is noticed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actckpt.checkpoint.names import MANIFEST
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.shared_directory import SharedDirectory
from actckpt.sharded import committing, sight
from actckpt.sharded.committing import SaveTogether
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.whereabouts import Look


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to whom.

    Args:
        signal: SIGKILL or SIGSTOP.
        rank: to which; -1 is every one.
        where: "call", the name of one, or "message" of the second save; or "vanish": what the rank
            has written is nowhere to be seen once it has voted.
        at: before which of them; -1 is never.
    """

    signal: signal.Signals
    rank: int
    where: str
    at: int

    def __str__(self) -> str:
        return f"{self.signal.name} of rank {self.rank} before {self.where} {self.at}"


CALM = Fault(signal.SIGKILL, 0, "call", -1)
VANISHED = Fault(signal.SIGKILL, 1, "vanish", 0)


@dataclass(frozen=True, slots=True)
class Mutant:
    """What is broken, under which fault that shows, and what is said of it."""

    breaks: Callable[[], None]
    fault: Fault
    harm: str


def lock_by_every_rank() -> None:
    """Each takes the lock for itself."""
    SharedDirectory.acquire_unless_read_only = (  # type: ignore[method-assign]
        RunDirectory.acquire_unless_read_only
    )
    SharedDirectory.acquire = RunDirectory.acquire  # type: ignore[method-assign]


def no_vote() -> None:
    """The coordinator waits for no vote but its own."""
    hear_all = Exchange.hear_all

    def hasty(self: Exchange, key: str, look: Look | None = None) -> list[Any]:
        if not key.endswith("/vote"):
            return hear_all(self, key, look)
        return [self.hear(f"{key}/of/0", (0,))] * self.world_size

    Exchange.hear_all = hasty  # type: ignore[method-assign]


def nobody_looks() -> None:
    """The coordinator believes every vote."""
    sight.check_present = lambda files, where, entry: None  # type: ignore[attr-defined]


def verdict_before_the_rename() -> None:
    """Success is told before there is a checkpoint."""
    decide = SaveTogether._decide

    def early(self: SaveTogether, votes: Any, name: str, save: str) -> Any:
        rename = self._files.rename

        def renaming(source: str, target: str) -> None:
            manifest = Path(source, MANIFEST).read_text(encoding="utf-8")
            self._exchange.tell(f"{self._key}/verdict", {"manifest": manifest})
            rename(source, target)

        self._files.rename = renaming  # type: ignore[method-assign]
        return decide(self, votes, name, save)

    SaveTogether._decide = early  # type: ignore[method-assign]


def in_sight() -> None:
    """Ranks write under the final name."""
    committing.unique = lambda prefix, name: name  # type: ignore[attr-defined]


MUTANTS = {
    "lock by every rank": Mutant(lock_by_every_rank, CALM, "is being written by another"),
    "no vote": Mutant(no_vote, CALM, "nothing happened, and the verdicts are"),
    "the coordinator does not look": Mutant(nobody_looks, VANISHED, "does not verify"),
    "verdict before the rename": Mutant(
        verdict_before_the_rename,
        Fault(signal.SIGKILL, 0, "rename", 0),
        "took it for committed, and it is not there",
    ),
    "written in sight": Mutant(
        in_sight, Fault(signal.SIGKILL, -1, "call", 40), "there are checkpoints of [1], and"
    ),
}
