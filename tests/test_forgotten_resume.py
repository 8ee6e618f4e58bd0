"""A directory that holds another run's checkpoints: refused, gone on from, or cleared; never mixed.

Whatever this run neither made nor went on from, it leaves alone.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import actckpt
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import PINNED
from tests.small_run import advance, names, objects, state
from tests.system_calls import Call, Watched, before
from tests.test_checkpoint_encoding import same

SET_ASIDE = "set-aside-"
OLD = ["step-00000003", "step-00000002"]


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """A run of three steps, of which two are kept, one of them pinned."""
    made = objects()
    with actckpt.Checkpointer(tmp_path / "run", **made, every=1, keep_last=2) as run:
        advance(run, made, 3)
        run.pin(2)
    return tmp_path / "run"


def steps(run: actckpt.Checkpointer) -> None:
    next(iter(run.steps([1, 2])))


@pytest.mark.kind("resume() forgotten", resumed="said no")
@pytest.mark.parametrize(
    "first",
    [steps, lambda r: r.step(), lambda r: r.save(), lambda r: r.save(wait=False)],
    ids=["steps", "step", "save", "save behind"],
)
def test_without_resume_nothing_is_trained_or_saved_there(
    first: Callable[[actckpt.Checkpointer], Any], occupied: Path
) -> None:
    tree = sorted(map(str, occupied.rglob("*")))
    with actckpt.Checkpointer(occupied, **objects(), every=1, keep_last=1) as run:
        for _ in range(2):
            with pytest.raises(actckpt.CheckpointError) as refused:
                first(run)
        assert run.step_count == 0
        said = str(refused.value)
        assert "2 checkpoints, the newest of step 3" in said
        assert all(way in said for way in ("resume()", "another directory", "fresh=True"))
        # looking is free
        assert names(run) == OLD
        assert run.best("loss") is None
    assert sorted(map(str, occupied.rglob("*"))) == tree


def test_damaged_ones_are_another_runs_too(occupied: Path) -> None:
    for name in OLD:
        (occupied / name / "manifest.json").unlink()
    with (
        actckpt.Checkpointer(occupied, **objects()) as run,
        pytest.raises(actckpt.CheckpointError, match="2 checkpoints, none of them usable"),
    ):
        run.step()
    assert set(OLD) < set(os.listdir(occupied))


@pytest.mark.parametrize("call", ["step", "resume", "save"])
def test_fresh_begins_anew_and_keeps_the_old(call: str, occupied: Path) -> None:
    made = objects(seed=1)
    before = state(made)
    with actckpt.Checkpointer(occupied, **made, every=1, keep_last=1, fresh=True) as run:
        assert names(run) == OLD  # until there is something new
        assert getattr(run, call)() in (True, None) or call == "save"
        run.resume()
        advance(run, made, 3)
        assert len(names(run)) == 1
        assert run.step_count == 3 + (call == "step")
    assert not same(state(made), before)
    (folder,) = occupied.glob(f"{SET_ASIDE}*")
    assert sorted({*os.listdir(folder)} - {"journal.jsonl"}) == [
        f"{PINNED}{OLD[1]}",
        *reversed(OLD),
    ]
    assert not (occupied / f"{PINNED}{OLD[1]}").exists()
    with actckpt.Checkpointer(folder, **made) as old:
        resumed = old.resume()
        assert resumed is not None
        assert resumed.step == 3


def test_fresh_twice_within_a_second(occupied: Path) -> None:
    for _ in range(2):
        with actckpt.Checkpointer(occupied, **objects(), fresh=True) as run:
            run.save()
    folders = sorted(occupied.glob(f"{SET_ASIDE}*"), key=lambda f: len(os.listdir(f)))
    assert [len(os.listdir(folder)) for folder in folders] == [1, 4]  # with its pin and its journal


def test_interrupted_at_any_call_fresh_loses_nothing(occupied: Path, tmp_path: Path) -> None:
    left_calls = 0

    def interrupt(_: Call) -> None:
        nonlocal left_calls
        left_calls -= 1
        if left_calls == 0:
            raise KeyboardInterrupt

    for stop_at in itertools.count(1):
        place = tmp_path / str(stop_at)
        shutil.copytree(occupied, place)
        run = actckpt.Checkpointer(
            place, **objects(), every=None, fresh=True, files=Files(Watched(before(interrupt)))
        )
        left_calls, interrupted = stop_at, False
        try:
            run.step()
        except KeyboardInterrupt:
            interrupted = True
        left_calls = 0
        found = [discover(Files(), str(f)) for f in (place, *place.glob(f"{SET_ASIDE}*"))]
        left = {c.path.name: c for f in found for c in f.checkpoints}
        assert sorted(left) == sorted(OLD), stop_at
        for checkpoint in left.values():
            checkpoint.verify()
        if found[0].checkpoints:
            assert found[0].checkpoints[0].path.name == OLD[0]
        run.close()
        if not interrupted:
            break
    assert stop_at > 15


def test_what_came_from_elsewhere_is_not_retired(occupied: Path, tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path / "mine", **made, every=1, keep_last=1) as run:
        advance(run, made, 1)
        shutil.copytree(occupied / OLD[0], tmp_path / "mine" / OLD[0])
        advance(run, made, 3)
        assert names(run) == ["step-00000004", OLD[0]]
    # who goes on from them, makes them its own
    with actckpt.Checkpointer(tmp_path / "mine", **made, every=1, keep_last=1) as run:
        run.resume()
        advance(run, made, 1)
        assert names(run) == ["step-00000005"]


def test_restoring_only_weights_is_a_run_of_its_own(occupied: Path) -> None:
    made = objects(seed=1)
    with actckpt.Checkpointer(occupied, **made, every=1, keep_last=1) as run:
        run.restore(only=["model"])
        advance(run, made, 2)
        assert names(run) == ["step-00000002.1", *OLD]


def test_restored_and_fresh_the_old_ones_go_all_the_same(occupied: Path) -> None:
    made = objects(seed=1)
    with actckpt.Checkpointer(occupied, **made, every=1, fresh=True) as run:
        run.restore(2)
        assert names(run) == OLD
        advance(run, made, 1)
        assert names(run) == ["step-00000003"]
