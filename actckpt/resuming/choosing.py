"""Which checkpoint a run goes on from: the newest whose every byte is as it was written."""

from __future__ import annotations

import logging
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
    found = directory.find()
    if not found.checkpoints and not found.skipped:
        return None
    skipped: list[Skipped] = list(found.skipped)
    for checkpoint in found.checkpoints:
        try:
            _, items = read_state(directory.files, str(checkpoint.path))
        except CheckpointFormatError as error:
            logger.warning("actckpt: skipping %s: %s", checkpoint.path.name, error)
            skipped.append(Skipped(checkpoint.path.name, str(error)))
            continue
        return Chosen(checkpoint, items, tuple(skipped))
    reasons = "\n".join(f"  {s.name}: {s.reason}" for s in skipped[:5])
    raise CheckpointError(
        f"{directory.path} has {len(skipped)} checkpoints and none can be used:\n{reasons}\n"
        "Restore one from a copy, or start in another directory; nothing was changed"
    )


def of_step(directory: RunDirectory, step: int | None) -> Chosen:
    """The newest checkpoint of a step, verified; None is the newest of all.

    Raises:
        CheckpointFormatError: that checkpoint is damaged.
        CheckpointError: there is no such checkpoint.
    """
    checkpoint = directory.of_step(step)
    _, items = read_state(directory.files, str(checkpoint.path))
    return Chosen(checkpoint, items)
