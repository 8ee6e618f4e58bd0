"""Frozen tensors beside checkpoints, kept in broken ways on purpose."""

from __future__ import annotations

import pytest

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.frozen_files import sweep
from actckpt.checkpoint.names import FROZEN
from actckpt.resuming import directory
from actckpt.resuming.directory import RunDirectory

Patch = pytest.MonkeyPatch


def base_deleted_first(mp: Patch) -> None:
    """What only old checkpoints name goes before they do."""
    delete = RunDirectory._delete

    def early(self: RunDirectory, doomed: list[Checkpoint], left: list[Checkpoint]) -> None:
        sweep(self.files, self.path, [c.manifest for c in left])
        delete(self, doomed, left)

    mp.setattr(RunDirectory, "_delete", early)


def base_never_deleted(mp: Patch) -> None:
    """It stays when nobody names it any more."""
    mp.setattr(directory, "sweep", lambda files, path, left: None)


def no_fsync_of_the_base(mp: Patch) -> None:
    """Its name is left to the file system."""
    sync = Files.sync_directory

    def lazy(self: Files, path: str) -> None:
        if not path.endswith(FROZEN):
            sync(self, path)

    mp.setattr(Files, "sync_directory", lazy)
