"""A run's directory: what is damaged, left over, somebody else's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import PINNED
from tests.small_run import advance, names, objects, state
from tests.system_calls import Call, Watched, before
from tests.test_checkpoint_encoding import same

ROOT = Path(__file__).parent.parent


def test_resume_skips_what_is_damaged_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
        expected = state(made)
        advance(run, made, 2)
    weights = tmp_path / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 1
        assert sorted(s.name for s in resumed.skipped) == ["step-00000002", "step-00000003"]
        assert "model.safetensors is truncated" in str(resumed)
        assert same(state(made), expected)
        advance(run, made, 2)
        assert run.save().path.name == "step-00000003.1"
    assert "model.safetensors is truncated" in caplog.text


def test_resume_raises_where_none_verifies(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 2)
    for path in tmp_path.glob("*/state.json"):
        path.write_text("{}")
    before = state(made)
    run = actckpt.Checkpointer(tmp_path, **made)
    with pytest.raises(actckpt.CheckpointError, match=r"2 checkpoints and none can be used"):
        run.resume()
    run.close()
    assert same(state(made), before)
    assert len([*tmp_path.glob("step-*")]) == 2


def test_one_writer(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made) as run:
        run.save()
        other = actckpt.Checkpointer(tmp_path, **objects())
        assert other.restore().step == 0  # reading is free
        with pytest.raises(actckpt.CheckpointError, match="another Checkpointer"):
            other.save(tag="mine")
        code = (
            "import torch, actckpt\n"
            f"run = actckpt.Checkpointer({str(tmp_path)!r}, model=torch.nn.Linear(1, 1))\n"
            "try:\n    run.resume()\nexcept actckpt.CheckpointError as e:\n    print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "another Checkpointer" in done.stdout
    other.save(tag="mine")
    other.close()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = actckpt.Checkpointer(tmp_path, **objects())
    run.save()
    read, write = os.pipe()
    begun, began = os.pipe()
    child = os.fork()
    if child == 0:  # waits until the parent has closed; holds whatever it has inherited
        os.write(began, b"1")
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    # the parent may be back from a fork before the child has begun
    assert os.read(begun, 1) == b"1"
    run.close()
    with actckpt.Checkpointer(tmp_path, **objects()) as other:
        other.resume()
        other.save(tag="while the child lives")
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0


def test_leftovers_of_killed_saves_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    made = objects()
    for name in (".saving-step-00000001-1-ab", ".deleting-step-00000001-1-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / f"{PINNED}step-00000001").touch()
    (tmp_path / ".my-own").mkdir()
    run = actckpt.Checkpointer(tmp_path, **made)
    assert run.list() == []
    assert len(os.listdir(tmp_path)) == 4
    run.save()
    run.close()
    assert sorted(os.listdir(tmp_path)) == [".lock", ".my-own", "step-00000000"]


def test_what_could_not_be_deleted_is_deleted_by_the_next_save(tmp_path: Path) -> None:
    busy = True

    def refuse(call: Call) -> None:
        if busy and call.name in ("unlink", "rmdir") and ".deleting" in call.args[0]:
            raise OSError(errno.ENOTEMPTY, "busy")

    made = objects()
    files = Files(Watched(before(refuse)))
    with actckpt.Checkpointer(tmp_path, **made, every=None, keep_last=1, files=files) as run:
        for _ in range(3):
            advance(run, made, 1)
            run.save()
        left = [name for name in os.listdir(tmp_path) if name.startswith(".deleting")]
        assert len(left) == 2
        busy = False
        advance(run, made, 1)
        run.save()
        assert names(run) == ["step-00000004"]
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".deleting")]


def test_a_checkpoint_that_may_not_be_read_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(call: Call) -> None:
        if call.name == "open" and "step-00000002/" in call.args[0]:
            raise PermissionError(errno.EACCES, "Permission denied")

    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 2)
    files = Files(Watched(before(refuse)))
    with actckpt.Checkpointer(tmp_path, **made, every=1, files=files) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 1
        assert "Permission denied" in str(resumed)
        assert "skipping step-00000002" in caplog.text
        advance(run, made, 1)
        run.save()


def test_a_damaged_checkpoint_keeps_no_sound_one_from_staying(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=2) as run:
        advance(run, made, 2)
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"no longer")
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=2) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 1
        advance(run, made, 1)
        run.save()
        assert names(run) == ["step-00000002.1", "step-00000002", "step-00000001"]


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    inside = actckpt.Checkpointer(tmp_path / "file" / "run", **objects())
    run = actckpt.Checkpointer(tmp_path / "file", **objects())
    (tmp_path / "file").touch()  # once there, the constructor refuses it
    with pytest.raises(actckpt.CheckpointSaveError, match="cannot be written"):
        inside.save()
    with pytest.raises(actckpt.CheckpointError, match="file"):
        run.list()
