"""A run's checkpoints moved out of the way of another's, each of them whole all the time."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.frozen_files import copy_base, sweep
from actckpt.checkpoint.names import PINNED, SET_ASIDE, is_journal
from actckpt.errors import CheckpointError, CheckpointSaveError

logger = logging.getLogger("actckpt")


def set_aside(files: Files, directory: str) -> str:
    """The folder that the checkpoints of a directory are in now, "" where there were none.

    It lies in the directory, has the date, and is one of a run like any other. Oldest first: who
    is interrupted leaves the newest where they were. The caller holds the lock.

    Raises:
        CheckpointSaveError: not all could be moved; each is whole, in one place or the other.
    """
    try:
        found = discover(files, directory)
        # what cannot be read is no loss to whoever looks in between
        names = [s.name for s in found.skipped]
        names += [c.path.name for c in reversed(found.checkpoints)]
        if not names:
            return ""
        folder = _new_folder(files, directory)
        files.sync_directory(directory)
        # those that were moved and those that were not yet need them
        copy_base(files, directory, folder)
        for name in names:
            files.rename(f"{directory}/{name}", f"{folder}/{name}")
            if files.status(f"{directory}/{PINNED}{name}") is not None:
                files.rename(f"{directory}/{PINNED}{name}", f"{folder}/{PINNED}{name}")
            # new names first: a loss of power between the two leaves one, or both
            files.sync_directory(folder)
            files.sync_directory(directory)
        sweep(files, directory, ())
        for name in filter(is_journal, files.names(directory)):
            with suppress(OSError):  # no checkpoint needs it
                files.rename(f"{directory}/{name}", f"{folder}/{name}")
    except (OSError, CheckpointError) as error:
        raise CheckpointSaveError(
            f"the checkpoints in {directory} could not be moved away: {error}. Each is whole, "
            "there or in a folder beside; remove the cause, or choose another directory"
        ) from error
    logger.warning("actckpt: %d checkpoints in %s are in %s now", len(names), directory, folder)
    return folder


def _new_folder(files: Files, directory: str) -> str:
    first = folder = f"{directory}/{SET_ASIDE}{time.strftime('%Y-%m-%d-%H%M%S')}"
    copy = 1
    while files.status(folder) is not None:
        copy += 1
        folder = f"{first}-{copy}"
    files.make_directory(folder)
    return folder
