"""Space is looked at before a save: what is needed is known, and nothing is begun in vain."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.checkpoint.files import Files
from tests.small_run import advance, names, objects
from tests.system_calls import Call, Make, Watched


def reporting(free_bytes: int) -> tuple[Files, list[str]]:
    """Files of a device with so much left, and the names of the calls."""
    calls: list[str] = []

    def around(call: Call, make: Make) -> Any:
        calls.append(call.name)
        return free_bytes if call.name == "free_bytes" else make(call)

    return Files(Watched(around)), calls


class Words:
    """A state that is all text."""

    def state_dict(self) -> dict[str, Any]:
        return {"words": ["word"] * 500_000}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


WRITING = {"write", "mkdir", "rename", "unlink"}


@pytest.mark.kind("too little space for a checkpoint", resumed="exact")
@pytest.mark.parametrize("background", [False, True])
def test_too_little_space_is_told_before_anything_is_written(
    background: bool, tmp_path: Path
) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        advance(run, made, 1)
        run.save()
    tree = {p: p.stat().st_size for p in tmp_path.rglob("step-*/*")}
    files, calls = reporting(2_000_000)
    extra = {"words": Words()}  # 4 MB of JSON, no tensor
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made, every=None, files=files) as run:
        run.resume()
    with actckpt.Checkpointer(
        tmp_path, **made, extra=extra, every=None, files=files, keep_last=1
    ) as run:
        run.restore(only=["model"])
        calls.clear()
        if background:
            run.save(wait=False)
            run.list()  # which waits
            # before the step: that one may write a line into the journal
            assert not WRITING & {*calls}
        with pytest.raises(actckpt.CheckpointSaveError, match="GB are free") as refused:
            run.step() if background else run.save()
        assert refused.value.free_bytes == 2_000_000
        assert refused.value.needed_bytes is not None
        assert 4_000_000 < refused.value.needed_bytes < 6_000_000
        assert background or not WRITING & {*calls}
        assert names(run) == ["step-00000001"]
    assert {p: p.stat().st_size for p in tmp_path.rglob("step-*/*")} == tree
    with actckpt.Checkpointer(tmp_path, **objects(), every=None) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 1


@pytest.mark.parametrize("layers", [1, 400])
def test_what_is_needed_is_what_it_takes(layers: int, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    files, _ = reporting(0)
    with (
        actckpt.Checkpointer(
            tmp_path / "full", model=model, optimizer=optimizer, every=None, files=files
        ) as run,
        pytest.raises(actckpt.CheckpointSaveError) as refused,
    ):
        run.save()
    needed = refused.value.needed_bytes
    assert needed is not None
    with actckpt.Checkpointer(tmp_path / "run", model=model, optimizer=optimizer) as run:
        saved = run.save()
    taken = sum(-(-p.stat().st_size // 4096) * 4096 for p in saved.path.iterdir())
    assert taken <= needed < 2 * taken + 200_000


def test_a_file_system_that_does_not_say_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = SimpleNamespace(f_blocks=0, f_bavail=0, f_bfree=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: silent)
    with actckpt.Checkpointer(tmp_path, **objects(), every=None) as run:
        run.save()
        assert names(run) == ["step-00000000"]


@pytest.mark.parametrize(("user", "left"), [(0, 5), (1000, 0)])
def test_what_is_kept_for_the_superuser_is_his(
    user: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(f_blocks=100, f_bavail=0, f_bfree=5, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert Files().free_bytes(str(tmp_path)) == left * 4096
