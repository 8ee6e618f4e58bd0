"""Which checkpoints stay, and how the others go: out of sight in one step, then deleted."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import DELETING, PINNED, SAVING, unique
from actckpt.errors import ArgumentError

logger = logging.getLogger("actckpt")


@dataclass(frozen=True, slots=True)
class Keep:
    """A retention policy: called with the checkpoints, newest first, it returns those that stay.

    What any of the settings keeps, stays; so does everything that is pinned, and the newest.

    Args:
        last: how many of the newest, at least 1; None keeps all.
        best: (metric, "min" or "max", how many). A NaN is never best, nor is a checkpoint without
            the metric; of equal ones the newer.
        every: also every checkpoint whose step is a multiple of this.
        hourly, daily: of the last so many hours (days) in which there is a checkpoint, the newest.
    """

    last: int | None = 3
    best: tuple[str, str, int] | None = None
    every: int | None = None
    hourly: int | None = None
    daily: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and not _positive(self.last):
            raise ArgumentError(
                f"keep_last must be at least 1, or None for all; found {self.last!r}"
            )
        if self.every is not None and not _positive(self.every):
            raise ArgumentError(f"keep_every must be a number of steps; found {self.every!r}")
        for name, spans in (("keep_hourly", self.hourly), ("keep_daily", self.daily)):
            if spans is not None and not _positive(spans):
                raise ArgumentError(f"{name} must be at least 1; found {spans!r}")
        if self.best is not None:
            valid = isinstance(self.best, tuple | list) and len(self.best) == 3
            valid = valid and isinstance(self.best[0], str)
            if not valid or self.best[1] not in ("min", "max") or not _positive(self.best[2]):
                raise ArgumentError(
                    'keep_best must be (metric, "min" or "max", how many), such as '
                    f'("val_loss", "min", 1); found {self.best!r}'
                )

    def __call__(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that stay, in the same order."""
        keep = {c.path for c in checkpoints[: self.last]} | {c.path for c in checkpoints[:1]}
        keep |= {c.path for c in checkpoints if c.pinned}
        if self.every is not None:
            keep |= {c.path for c in checkpoints if c.step % self.every == 0}
        if self.best is not None:
            metric, mode, count = self.best
            keep |= {c.path for c in ranked(checkpoints, metric, mode)[:count]}
        for seconds, spans in ((3_600, self.hourly), (86_400, self.daily)):
            newest = {int(c.manifest.saved_at_s // seconds): c.path for c in reversed(checkpoints)}
            keep |= {newest[k] for k in sorted(newest, reverse=True)[: spans or 0]}
        return [c for c in checkpoints if c.path in keep]


def ranked(checkpoints: Sequence[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    """The checkpoints that have ``metric`` and no NaN there, best first, newer first among equals.

    Args:
        mode: "min" or "max".
    """
    sign = 1 if mode == "min" else -1
    having = [c for c in checkpoints if not math.isnan(c.metrics.get(metric, math.nan))]
    return sorted(having, key=lambda c: (sign * c.metrics[metric], -c.manifest.serial))


def retire(files: Files, directory: str, doomed: Sequence[Checkpoint]) -> None:
    """Deletes checkpoints, oldest first. The caller holds the lock, and has a newer verified one.

    Raises:
        OSError: one could not be deleted; it is whole, or no checkpoint any more.
    """
    for checkpoint in reversed(doomed):
        name = checkpoint.path.name
        trash = f"{directory}/{unique(DELETING, name)}"
        files.rename(f"{directory}/{name}", trash)
        # before anything of it is gone: a power loss must not bring back half of it
        files.sync_directory(directory)
        files.remove_tree(trash)


def clean(files: Files, directory: str) -> None:
    """Deletes what killed saves and deletions left behind. The caller holds the lock.

    Raises:
        OSError: something could not be deleted.
    """
    names = files.names(directory)
    if any(name.startswith(DELETING) for name in names):
        # who was killed may not have come to this: as in `retire`
        files.sync_directory(directory)
    for name in names:
        if name.startswith((SAVING, DELETING)):
            logger.info("actckpt: removing %s/%s, left by a process that ended", directory, name)
            files.remove_tree(f"{directory}/{name}")
        elif name.startswith(PINNED) and name.removeprefix(PINNED) not in names:
            files.remove_tree(f"{directory}/{name}")


def _positive(x: object) -> bool:
    return type(x) is int and x >= 1
