"""The disk of one rank fills up, or can no longer be written, before any call of a save.

Ranks are threads here, each with system calls of its own. ``ACTCKPT_FAULTS=whole`` tries every
call; the suite some.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.checkpoint.discovery import Checkpoint, discover
from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import CheckpointSaveError, CheckpointUnknownError
from tests.system_calls import Call, Watched, before
from tests.threaded_ranks import save_together, saved_together

EVERY = 1 if os.environ.get("ACTCKPT_FAULTS") == "whole" else 7
# what needs room; what changes anything; all that may wait for a server that has gone
KINDS = {
    errno.ENOSPC: ("open for writing", "write", "fsync", "mkdir", "rename"),
    errno.EROFS: ("open for writing", "write", "mkdir", "rename", "unlink", "rmdir"),
    errno.EACCES: ("open for writing", "mkdir", "rename", "unlink", "rmdir"),
    errno.EIO: ("open", "open for writing", "write", "readinto", "fsync", "mkdir", "rename"),
}


def kind_of(call: Call) -> str:
    """Its name; those are told apart that make a file, or change one."""
    writes = call.name == "open" and call.args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return "open for writing" if writes else call.name


class Failing:
    """From one such call on the disk fails.

    Args:
        code: with which error.
        at: from the how-manieth on; -1 is never.
    """

    def __init__(self, code: int, at: int) -> None:
        self._code, self._at = code, at
        self.count = 0

    def __call__(self, call: Call) -> None:
        if kind_of(call) in KINDS[self._code]:
            self.count += 1
            if 0 <= self._at < self.count:
                raise OSError(self._code, os.strerror(self._code))


def snapshot(step: int, rank: int) -> Snapshot:
    """Something that all have, and something of each."""
    state = {"weight": torch.full((3,), float(step)), "same": torch.arange(5)}
    items = {
        "model": encode(state, "model"),
        "random": encode({"stream": torch.full((7,), rank)}, "random"),
    }
    return Snapshot(step, items, "", {}, "", {})


def on_files(acts: list[Callable[[Call], None]]) -> Callable[[int], Files]:
    """For each rank its own."""
    return lambda rank: Files(Watched(before(acts[rank])))


@pytest.mark.parametrize("code", KINDS, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("victim", [0, 1])
def test_no_rank_is_told_of_a_checkpoint_that_is_not_there(
    code: int, victim: int, tmp_path: Path
) -> None:
    calm = [Failing(code, -1) for _ in range(2)]
    first = [snapshot(1, rank) for rank in range(2)]
    for made in save_together(tmp_path / "calm", first, on_files([*calm])):
        assert isinstance(made, Checkpoint)
    failed = 0
    for at in range(0, calm[victim].count, EVERY):
        directory = tmp_path / str(at)
        saved_together(directory, first)
        acts = [Failing(code, at if rank == victim else -1) for rank in range(2)]
        second = [snapshot(2, rank) for rank in range(2)]
        said = save_together(directory, second, on_files([*acts]), serial=2)
        failed += _agree(directory, said, victim, os.strerror(code))
        # once there is room again, so it goes on
        saved_together(directory, [snapshot(3, rank) for rank in range(2)], serial=3)
        assert discover(Files(), str(directory)).checkpoints[0].step == 3
    assert failed


def _agree(directory: Path, said: list[Any], victim: int, reason: str) -> bool:
    """Whether the save failed: then on every rank, for what was wrong on one of them."""
    found = discover(Files(), str(directory))
    steps = [c.step for c in found.checkpoints]
    assert not found.skipped
    for checkpoint in found.checkpoints:
        checkpoint.verify()
    assert steps[-1] == 1, "the earlier one is gone"
    if all(isinstance(s, Checkpoint) for s in said):
        assert steps == [2, 1]
        return False
    if all(isinstance(s, CheckpointUnknownError) for s in said):
        return False
    assert all(isinstance(s, CheckpointSaveError) for s in said), said
    assert steps == [1]
    assert all(reason in str(s) for s in said), said
    other = str(said[1 - victim])
    assert f"rank {victim}" in other or not victim, other
    assert "Earlier checkpoints are as before" in other
    return True
