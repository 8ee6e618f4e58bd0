"""Early stopping, metrics nobody reports, read-only directories, other numbers of processes."""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import actckpt
from actckpt.checkpoint.files import Files
from tests.small_run import advance, names, objects, state
from tests.system_calls import Call, Watched, before
from tests.test_checkpoint_encoding import same


def test_auto_saves_at_the_first_step_and_then_by_its_cost(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every="auto") as run:
        advance(run, made, 20)
        assert names(run) == ["step-00000001"]


def test_stopping_early_is_counted_across_processes(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, keep_best=("loss", "min", 1)) as run:
        stopped = []
        for loss in (3.0, 2.0, math.nan, 2.0):
            advance(run, made, 1, loss=loss)
            stopped.append(run.stop_early(2))
            advance(run, made, 1)  # without the metric: no report of it
            assert run.stop_early(2) == stopped[-1]
        assert stopped == [False, False, False, True]
        assert not run.stop_early(3)
        assert run.stop_early(3, "loss", "max")
        run.save()
    with actckpt.Checkpointer(tmp_path, **objects()) as run:
        run.resume()
        assert not run.stop_early(3, "loss")
        run.step(metrics={"loss": 2.5})
        assert run.stop_early(3, "loss")
        run.step(metrics={"loss": 1.5})
        assert not run.stop_early(1, "loss")
        assert not run.stop_early(1, "never reported")
        with pytest.raises(ValueError, match="no metric to go by"):
            run.stop_early(1)
        with pytest.raises(ValueError, match="patience"):
            run.stop_early(0, "loss")
        with pytest.raises(ValueError, match="mode"):
            run.stop_early(1, "loss", "least")


def test_a_metric_that_nobody_reports_is_said_once_before_anything_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()
    keep: dict[str, Any] = {"keep_last": 2, "keep_best": ("val_loss", "min", 1)}
    with actckpt.Checkpointer(tmp_path / "a", **made, every=1, **keep) as run:
        advance(run, made, 2, loss=1)
        run.list()
        assert "keep_best" not in caplog.text
        advance(run, made, 3, loss=1)
        assert len(run.list()) == 2
    assert caplog.text.count("keep_best goes by val_loss") == 1
    assert "metrics there: loss" in caplog.text


def test_a_metric_that_is_nan_is_saved_and_never_best(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(
        tmp_path, **made, keep_last=2, keep_best=("val_loss", "min", 1)
    ) as run:
        run.save(metrics={"val_loss": math.nan})
        for _ in range(4):
            advance(run, made, 1)
            run.save()
        assert len(run.list()) == 2
        assert run.best() is None


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_directory_is_resumed_from(code: int, tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made) as run:
        advance(run, made, 1)
        run.save()
    tree = sorted(os.listdir(tmp_path))

    def refuse(call: Call) -> None:
        writing = call.name == "open" and call.args[1] & (os.O_WRONLY | os.O_RDWR)
        if writing or call.name in ("mkdir", "rename", "unlink", "rmdir"):
            raise OSError(code, os.strerror(code), call.args[0])

    again = objects(seed=1)
    files = Files(Watched(before(refuse)))
    with actckpt.Checkpointer(tmp_path, **again, every=None, files=files) as run:
        resumed = run.resume()
        assert resumed is not None
        assert "no loader" in "".join(resumed.inexact)
        assert "cannot be written" in resumed.notes[0]
        assert same(state(again), state(made))
        advance(run, again, 1)
        with pytest.raises(actckpt.CheckpointSaveError, match="cannot be written"):
            run.save()
    assert sorted(os.listdir(tmp_path)) == tree
    shutil.rmtree(tmp_path / "step-00000001")
    run = actckpt.Checkpointer(tmp_path, **again, files=Files(Watched(before(refuse))))
    with pytest.raises(actckpt.CheckpointSaveError, match="cannot be written"):
        run.resume()  # nothing to resume, and nowhere to save


def test_fewer_processes_than_saved_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def world(size: int) -> None:
        monkeypatch.setattr("actckpt.resuming.progress.processes", lambda: size)

    made = objects()
    world(4)
    with actckpt.Checkpointer(tmp_path, **made) as run:
        advance(run, made, 1)
        run.save()
    again = objects(seed=1)
    before = state(again)
    with actckpt.Checkpointer(tmp_path, **again) as run:
        world(2)
        with pytest.raises(actckpt.CheckpointMismatchError, match="4 processes, this is one of 2"):
            run.resume()
        assert same(state(again), before)
        run.restore(only=["model", "optimizer"])
        assert same(state(again), state(made))
        world(8)
        resumed = run.resume()
        assert resumed is not None
        assert resumed.inexact[0] == "processes were 4, are 8"


def test_no_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    class Full(Watched):
        def free_bytes(self, path: str) -> int:
            return 1000

    calls = Full()
    with actckpt.Checkpointer(tmp_path, **objects(), files=Files(calls)) as run:
        with pytest.raises(actckpt.CheckpointSaveError, match=r"needs 0\.0000\d+ GB.*are free"):
            run.save()
        assert calls.counts["write"] == 0


# augmentation


class Noisy(Dataset[torch.Tensor]):
    """Items of which a part is drawn when they are read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([index, *noise], dtype=torch.float64)


def loader(workers: int, seeded: bool = True, **more: Any) -> DataLoader[Any]:
    data: Any = actckpt.SeededSamples(Noisy(), seed=3) if seeded else Noisy()
    return DataLoader(Subset(data, range(12)), 2, shuffle=True, num_workers=workers, **more)


def test_a_sample_depends_on_seed_epoch_and_index_and_moves_no_generator() -> None:
    data = actckpt.SeededSamples(Noisy(), seed=3)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    first = [data[i] for i in range(12)]
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(9)
    assert all(torch.equal(data[i], first[i]) for i in reversed(range(12)))
    assert torch.equal(data[np.int64(3)], first[3])
    assert len({tuple(x[1:].tolist()) for x in first}) == 12
    data.set_epoch(1)
    assert not any(torch.equal(data[i][1:], first[i][1:]) for i in range(12))
    other = actckpt.SeededSamples(Noisy(), seed=4)
    assert not torch.equal(other[0][1:], first[0][1:])


@pytest.mark.parametrize(("workers", "more"), [(0, {}), (2, {}), (2, {"persistent_workers": True})])
def test_seeded_samples_are_the_same_after_a_resume(
    workers: int, more: dict[str, Any], tmp_path: Path
) -> None:
    def run_of(seed: int, at: int) -> tuple[actckpt.Checkpointer, Any]:
        torch.manual_seed(seed)
        run = actckpt.Checkpointer(
            tmp_path, model=nn.Linear(1, 1), loader=loader(workers, **more), keep_last=None
        )
        return run, (run.restore(at) if at else None)

    def read(run: actckpt.Checkpointer, save: bool = False) -> list[Any]:
        found = []
        for _, batch in run.steps(epochs=2):
            found.append(batch.tolist())
            run.step()
            if save and run.step_count in (4, 8):
                run.save()
        run.close()
        return found

    whole = read(run_of(0, 0)[0], save=True)
    assert len({str(batch) for batch in whole}) == 12
    for at in (4, 8):
        run, resumed = run_of(5, at)
        assert resumed is not None
        assert resumed.bit_exact
        assert read(run) == whole[at:]


def test_random_states_of_workers_are_not_restored_and_the_report_says_so(tmp_path: Path) -> None:
    def resumed(workers: int, seeded: bool) -> tuple[str, ...]:
        with actckpt.Checkpointer(
            tmp_path, model=nn.Linear(1, 1), loader=loader(workers, seeded)
        ) as run:
            found = run.restore()
        return found.inexact

    with actckpt.Checkpointer(tmp_path, model=nn.Linear(1, 1), loader=loader(0, False)) as run:
        next(iter(run.steps()))
        run.step()
        run.save()
    assert resumed(0, False) == resumed(2, True) == ()
    (reason,) = resumed(2, False)
    assert reason.startswith("the loader had 0 workers, has 2")
    assert "SeededSamples" in reason
    again: dict[str, Any] = {"model": nn.Linear(1, 1), "loader": loader(2, False)}
    with actckpt.Checkpointer(tmp_path, **again, fresh=True) as run:
        next(iter(run.steps()))
        run.step()
        run.save()
    (reason,) = resumed(2, False)
    assert "2 loader workers" in reason
