"""Which checkpoint a run goes on from: the newest whose every byte is as it was written."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint, Skipped
from actckpt.checkpoint.reading import read_state
from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.resuming.directory import RunDirectory

logger = logging.getLogger("actckpt")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A verified checkpoint with what is in it.

    Args:
        skipped: newer ones that could not be used, and why.
    """

    checkpoint: Checkpoint
    items: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()


def newest(directory: RunDirectory) -> Chosen | None:
    """The newest checkpoint that verifies; None in an empty directory.

    Raises:
        CheckpointError: there are checkpoints and none verifies.
    """
    while True:
        found = directory.find()
        if not found.checkpoints and not found.skipped:
            return None
        skipped: list[Skipped] = list(found.skipped)
        for s in skipped:
            logger.warning("actckpt: skipping %s: %s", s.name, s.reason)
        for checkpoint in found.checkpoints:
            try:
                return Chosen(checkpoint, _read(directory, checkpoint), tuple(skipped))
            except _RetiredError:
                break
            except CheckpointFormatError as error:
                name = checkpoint.path.name
                logger.warning("actckpt: skipping %s: %s", name, error)
                skipped.append(Skipped(name, str(error)))
                directory.damaged.add(name)
        else:
            raise _none_of(directory, skipped)


def of_step(directory: RunDirectory, step: int | None) -> Chosen:
    """The newest checkpoint of a step, verified; None is the newest of all.

    Raises:
        CheckpointFormatError: that checkpoint is damaged.
        CheckpointError: there is no such checkpoint.
    """
    while True:
        checkpoint = directory.of_step(step)
        with suppress(_RetiredError):
            return Chosen(checkpoint, _read(directory, checkpoint))


class _RetiredError(Exception):
    """Another process has deleted a checkpoint since it was found; there is a newer one."""


def _read(directory: RunDirectory, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return read_state(directory.files, str(checkpoint.path))[1]
    except CheckpointFormatError:
        if directory.files.status(str(checkpoint.path)) is None:
            raise _RetiredError from None
        raise


def _none_of(directory: RunDirectory, skipped: list[Skipped]) -> CheckpointError:
    reasons = "\n".join(f"  {s.name}: {s.reason}" for s in skipped[:5])
    return CheckpointError(
        f"{directory.path} has {len(skipped)} checkpoints and none can be used:\n{reasons}\n"
        "Restore one from a copy, or start in another directory; nothing was changed"
    )
