"""Every file-system call goes through one place, and whatever one of them does, nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import actckpt
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.verification import verify_files
from tests.system_calls import Grudging, Watched, failing
from tests.test_checkpoint_encoding import same
from tests.test_checkpointer import advance, objects, state


def saved_run(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run of three checkpoints of which two are kept, and the state at each of them."""
    made = objects()
    states = []
    with actckpt.Checkpointer(directory, **made, keep_last=2) as run:
        for _ in range(3):
            advance(run, made, 1)
            run.save()
            states.append(state(made))
    return made, states


def test_interrupted_calls_and_small_pieces(tmp_path: Path) -> None:
    calls = Grudging()
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, keep_last=1, files=Files(calls)) as run:
        for _ in range(2):
            advance(run, made, 1)
            run.save()
        again = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **again, files=Files(calls)) as run:
        assert run.resume() is not None
    assert same(state(again), state(made))
    assert calls.interrupted > 100
    assert calls.counts["write"] > 10
    assert os.listdir(tmp_path / "step-00000002") != []


def test_no_other_file_is_touched_than_through_the_calls(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    inside = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in AUDITED and not inside:
            events.append((event, repr(args)))

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    watching = False
    sys.addaudithook(hook)
    made = objects()
    files = Files(Watched(enter, leave))
    with actckpt.Checkpointer(tmp_path / "a" / "b", **made, keep_last=1, files=files) as run:
        run.save()  # imports what is imported late
        run.restore()
        try:
            watching = True
            advance(run, made, 1)
            run.save()
            run.pin(1)
            run.restore()
            run.resume()
            run.list()
            run.close()
        finally:
            watching = False
    assert [e for e in events if str(tmp_path) in e[1]] == []
    # the hook works
    watching = True
    (tmp_path / "x").touch()
    watching = False
    assert [e for e in events if str(tmp_path) in e[1]] != []


AUDITED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.link",
           "os.symlink", "os.truncate", "os.scandir", "shutil.rmtree")  # fmt: skip


def attempt(
    directory: Path, before: Any = None, after: Any = None
) -> tuple[Watched, Exception | None, dict[str, Any]]:
    """A fourth save in a run of `saved_run`, and what it raised."""
    made = objects()
    calls = Watched(before, after)
    run = actckpt.Checkpointer(directory, **made, keep_last=2, files=Files(calls))
    error: Exception | None = None
    try:
        run.resume()
        advance(run, made, 1)
        run.save()
    except (actckpt.CheckpointError, OSError) as found:
        error = found
    finally:
        run.close()
    return calls, error, state(made)


@pytest.mark.parametrize(
    ("code", "late"), [(errno.EIO, False), (errno.EIO, True), (errno.EMFILE, False)]
)
def test_an_error_of_any_call_loses_nothing(code: int, late: bool, tmp_path: Path) -> None:
    _, states = saved_run(tmp_path / "sound")
    shutil.copytree(tmp_path / "sound", tmp_path / "first")
    calls, error, _ = attempt(tmp_path / "first")
    assert error is None
    fired = 0
    for at in range(calls.total):
        directory = tmp_path / str(at)
        shutil.copytree(tmp_path / "sound", directory)
        fault: Callable[..., Any] = failing(at, code)
        watched, error, new = attempt(directory, *((None, fault) if late else (fault, None)))
        fired += watched.total > at
        found = discover(Files(), str(directory))
        assert found.checkpoints, at
        for checkpoint in found.checkpoints:
            verify_files(Files(), str(checkpoint.path))
        newest = found.checkpoints[0].manifest
        assert newest.serial in (3, 4), at
        if error is None:
            assert newest.serial == 4, f"a save that said nothing saved nothing: call {at}"
        # whoever comes next finds it, can go on, and cleans up
        again = objects(seed=1)
        with actckpt.Checkpointer(directory, **again, keep_last=2) as run:
            resumed = run.resume()
            assert resumed is not None
            assert resumed.step == newest.step
            assert same(state(again), states[2] if newest.serial == 3 else new), at
            advance(run, again, 1)
            assert run.save().manifest.serial == newest.serial + 1
        leftovers = [n for n in os.listdir(directory) if n.startswith((".saving", ".deleting"))]
        assert leftovers == [], at
    assert fired == calls.total
