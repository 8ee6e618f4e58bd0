"""Every file-system call goes through one place, and may do less or be interrupted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import actckpt
from actckpt.checkpoint.files import Files
from tests.small_run import advance, objects, state
from tests.system_calls import Call, Grudging, Make, Watched
from tests.test_checkpoint_encoding import same


def test_interrupted_calls_and_small_pieces(tmp_path: Path) -> None:
    grudging = Grudging()
    calls = Watched(grudging)
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, keep_last=1, files=Files(calls)) as run:
        for _ in range(2):
            advance(run, made, 1)
            run.save()
        again = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **again, files=Files(calls)) as run:
        assert run.resume() is not None
    assert same(state(again), state(made))
    assert grudging.interrupted > 100
    assert calls.counts["write"] > 10
    assert os.listdir(tmp_path / "step-00000002") != []


def test_no_other_file_is_touched_than_through_the_calls(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    inside = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in AUDITED and not inside:
            events.append((event, repr(args)))

    def around(call: Call, make: Make) -> Any:
        nonlocal inside
        inside = True
        try:
            return make(call)
        finally:
            inside = False

    watching = False
    sys.addaudithook(hook)
    made = objects()
    files = Files(Watched(around))
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
