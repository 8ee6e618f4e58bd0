"""Ranks that are threads of one process, with a store between them: no process is started.

Their messages and their files are real; `tests.fleet` has ranks whose states are made up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.sharded.committing import SaveTogether
from actckpt.sharded.exchange import Exchange, Seat
from actckpt.sharded.known import Known
from actckpt.sharded.waiting import Patience

T = TypeVar("T")
# nothing here is slow for so long, and whoever waits longer waits for nobody
PATIENCE = Patience(silent_s=60.0, most_s=60.0)


@contextmanager
def exchanges(world: int) -> Iterator[list[Exchange]]:
    """One for each rank of a group of so many."""
    memory: Any = dist.HashStore()  # type: ignore[attr-defined]
    named = partial(_named, memory)
    found = [Exchange(PATIENCE, Seat(rank, world, "threads", named)) for rank in range(world)]
    try:
        yield found
    finally:
        for exchange in found:
            exchange.end()


def _named(store: Any, prefix: str) -> Any:
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def on_every_rank(world: int, act: Callable[[int], T]) -> list[T | Exception]:
    """What each rank's call returns or raises, all of them at once."""
    found: list[T | Exception] = [RuntimeError("has not ended")] * world

    def run(rank: int) -> None:
        try:
            found[rank] = act(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def part_of_save(
    exchange: Exchange,
    directory: Path,
    snapshot: Snapshot,
    files: Files,
    serial: int,
    known: Known | None = None,
) -> Checkpoint:
    """One rank's part of a save.

    Args:
        known: what it knows of the saves before.
    """
    return SaveTogether(
        exchange,
        files,
        str(directory),
        snapshot,
        Known() if known is None else known,
        key=f"save/{snapshot.step}.0",
        prepare=lambda: serial,
        begun=lambda serial: None,
        settled=lambda: None,
        verify="full",
    ).run()


def save_together(
    directory: Path,
    snapshots: Sequence[Snapshot],
    files: Callable[[int], Files] = lambda rank: Files(),
    *,
    serial: int = 1,
) -> list[Checkpoint | Exception]:
    """What comes of a save of so many ranks, on each of them.

    Args:
        files: of each rank.
    """
    directory.mkdir(exist_ok=True)
    world = len(snapshots)
    with exchanges(world) as ranks:
        return on_every_rank(
            world,
            lambda rank: part_of_save(ranks[rank], directory, snapshots[rank], files(rank), serial),
        )


def saved_together(directory: Path, snapshots: Sequence[Snapshot], serial: int = 1) -> Checkpoint:
    """The checkpoint that ranks make, which all of them have then."""
    found = save_together(directory, snapshots, serial=serial)
    for made in found:
        if isinstance(made, Exception):
            raise made
    first = found[0]
    assert isinstance(first, Checkpoint)
    return first
