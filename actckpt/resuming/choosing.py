"""Which checkpoint a run goes on from: the newest whose every byte is as it was written."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actckpt.checkpoint.discovery import Checkpoint, Skipped
from actckpt.checkpoint.reading import read_state
from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.resuming.places import Places

logger = logging.getLogger("actckpt")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A verified checkpoint with what is in it.

    Args:
        skipped: newer ones that could not be used, and why.
        inexact: why these cannot be the items that this process would have had.
        unreached: stores that may have newer ones, and why they could not be read.
    """

    checkpoint: Checkpoint
    items: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()
    inexact: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()


class Choice(Protocol):
    """Who says which checkpoint a run goes on from."""

    def newest(self) -> Chosen | None:
        """The newest one that verifies; None in an empty directory."""

    def of_step(self, step: int | None) -> Chosen:
        """The newest one of a step, verified; None is the newest of all."""

    def agreed(self) -> AbstractContextManager[None]:
        """What the block raises, every process of the run raises."""

    def elsewhere(self, names: frozenset[str]) -> frozenset[str]:
        """What other processes of the run have; this one has ``names``."""


class OwnChoice:
    """What a process on its own goes on from."""

    def __init__(self, places: Places, joined: frozenset[str]) -> None:
        self._places = places
        self._joined = joined

    def newest(self) -> Chosen | None:
        """As the function."""
        return newest(self._places, self._joined)

    def of_step(self, step: int | None) -> Chosen:
        """As the function."""
        return of_step(self._places, step, self._joined)

    def agreed(self) -> AbstractContextManager[None]:
        """There is nobody to agree with."""
        return nullcontext()

    def elsewhere(self, names: frozenset[str]) -> frozenset[str]:
        """There is nobody else."""
        return frozenset()


def newest(places: Places, joined: frozenset[str]) -> Chosen | None:
    """The newest checkpoint that verifies; None in an empty directory.

    Raises:
        CheckpointError: there are checkpoints and none verifies; or there are none where they can
            be looked for, and a store cannot be read.
    """
    while True:
        found = places.candidates()
        if not found.found and not found.skipped:
            if found.unreached:
                raise nothing_but(places.path, found.unreached[0])
            return None
        skipped: list[Skipped] = list(found.skipped)
        for s in skipped:
            logger.warning("actckpt: skipping %s: %s", s.name, s.reason)
        for candidate in found.found:
            try:
                chosen = _read(places, candidate.get(), joined)
                return replace(chosen, skipped=tuple(skipped), unreached=found.unreached)
            except _RetiredError:
                break
            except CheckpointFormatError as error:
                logger.warning("actckpt: skipping %s: %s", candidate.name, error)
                skipped.append(Skipped(candidate.name, str(error)))
        else:
            raise none_of(places.path, skipped)


def of_step(places: Places, step: int | None, joined: frozenset[str]) -> Chosen:
    """The newest checkpoint of a step, verified; None is the newest of all.

    Raises:
        CheckpointFormatError: that checkpoint is damaged.
        CheckpointError: there is no such checkpoint.
    """
    while True:
        checkpoint = places.of_step(step).get()
        with suppress(_RetiredError):
            return _read(places, checkpoint, joined)


class _RetiredError(Exception):
    """Another process has deleted a checkpoint since it was found; there is a newer one."""


def _read(places: Places, checkpoint: Checkpoint, joined: frozenset[str]) -> Chosen:
    files, path, manifest = places.files, str(checkpoint.path), checkpoint.manifest
    try:
        if not manifest.world_size:
            return Chosen(checkpoint, read_state(files, path)[1])
        # torch's distributed packages take a second to import
        from actckpt.resuming.share import read_share

        share = read_share(
            files,
            path,
            manifest,
            rank=0,
            world_size=1,
            like=lambda item, name, shape: None,
            joined=joined,
        )
        return Chosen(checkpoint, share.items, inexact=share.inexact)
    except CheckpointFormatError:
        if places.files.status(str(checkpoint.path)) is None:
            raise _RetiredError from None
        places.of(checkpoint).directory.damaged.add(checkpoint.path.name)
        raise


def nothing_but(path: str, unreached: str) -> CheckpointError:
    """That what there may be is in a store that cannot be read."""
    return CheckpointError(
        f"{path} has no checkpoint, and {unreached}. To begin anew, leave that tier out"
    )


def none_of(path: str, skipped: list[Skipped]) -> CheckpointError:
    """That of what is there nothing can be used."""
    reasons = "\n".join(f"  {s.name}: {s.reason}" for s in skipped[:5])
    return CheckpointError(
        f"{path} has {len(skipped)} checkpoints and none can be used:\n{reasons}\n"
        "Restore one from a copy, or start in another directory; nothing was changed"
    )
