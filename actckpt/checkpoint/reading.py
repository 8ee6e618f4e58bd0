"""The state of a checkpoint, or of the newest of a run, while somebody else may write there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint, checkpoint_at
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.verification import read_state
from actckpt.errors import CheckpointFormatError


def read_checkpoint(
    files: Files, checkpoint: Checkpoint | str | os.PathLike[str]
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its items, every byte verified. Takes no lock.

    Args:
        checkpoint: one, its directory, or that of a run, which stands for the newest.

    Raises:
        CheckpointFormatError: it is damaged.
        CheckpointError: there is none.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint, read_state(files, str(checkpoint.path))[1]
    while True:
        found = checkpoint_at(files, os.fspath(checkpoint))
        try:
            return found, read_state(files, str(found.path))[1]
        except CheckpointFormatError:
            # of a run whose newest was retired in the meantime, there is a newer one
            if found.path == Path(checkpoint) or files.status(str(found.path)) is not None:
                raise
