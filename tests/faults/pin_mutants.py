"""Pinning broken on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep
from actckpt.resuming.directory import RunDirectory

Patch = pytest.MonkeyPatch


def pins_overlooked(mp: Patch) -> None:
    """Retention does not know of pins."""
    call = Keep.__call__

    def blind(self: Keep, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        kept = {c.path for c in call(self, [replace(c, pinned=False) for c in checkpoints])}
        return [c for c in checkpoints if c.path in kept]

    mp.setattr(Keep, "__call__", blind)


def no_fsync_of_pins(mp: Patch) -> None:
    """That something is pinned, or no longer, is left to the file system."""
    pin = RunDirectory.pin

    def lazy(self: RunDirectory, step: int, pinned: bool) -> None:
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(Files, "sync_directory", lambda self, path: None)
            pin(self, step, pinned)

    mp.setattr(RunDirectory, "pin", lazy)
