"""What a user says of a further place for checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from actckpt.checkpoint.local_path import is_url
from actckpt.errors import ArgumentError
from actckpt.resuming.cadence import Cadence


@dataclass(frozen=True, slots=True)
class Tier:
    """A place beside a run's directory that its checkpoints go to, too.

    Args:
        path: a folder of this run alone, which a checkpoint is written into whenever one is due
            there, such as one in shared memory; or the URL of an object store, which finished
            checkpoints of the run's directory are copied to, by fsspec. Where many ranks train
            together, a folder is that of each rank's own machine, and what is written on one of
            them is copied to the next.
        every: a number of steps, or a duration such as "10 minutes". To a store goes the first
            checkpoint of the run's directory that is made so long after the last one there, and at
            `Checkpointer.close` the newest.
        keep: how many of the newest checkpoints stay there.

    Raises:
        ArgumentError: an argument is none of these.
    """

    path: str | os.PathLike[str]
    every: int | str
    keep: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not os.fspath(self.path):
            raise ArgumentError(f"a tier's path is a folder or a URL; found {self.path!r}")
        if not isinstance(self.every, int | str) or self.every in ("auto", "epoch", "doubling"):
            raise ArgumentError(
                f"a tier needs every=, a number of steps or a duration; found {self.every!r} for "
                f"{os.fspath(self.path)}"
            )
        Cadence(self.every)
        if type(self.keep) is not int or self.keep < 1:
            raise ArgumentError(
                f"a tier keeps at least 1 checkpoint; found keep={self.keep!r} for "
                f"{os.fspath(self.path)}"
            )

    @property
    def is_store(self) -> bool:
        """Whether it is no folder of this machine."""
        return is_url(self.path)


def as_tiers(
    given: Iterable[Tier | tuple[str | os.PathLike[str], int | str, int]],
) -> list[Tier]:
    """The tiers that were given, as such or as (path, every, keep).

    Raises:
        ArgumentError: one is neither, or two are of one path.
    """
    tiers: list[Tier] = []
    for tier in given:
        if isinstance(tier, tuple) and len(tier) in (2, 3):
            tier = Tier(*tier)
        if not isinstance(tier, Tier):
            raise ArgumentError(
                "tiers= takes actckpt.Tier objects or tuples (path, every, keep), such as "
                f'("/dev/shm/a", 50, 1); found {tier!r:.80}'
            )
        tiers.append(tier)
    paths = [os.fspath(t.path) for t in tiers]
    for path in paths:
        if paths.count(path) > 1:
            raise ArgumentError(f"tiers= names {path} twice")
    return tiers
