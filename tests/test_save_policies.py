"""When checkpoints are made and which stay, beyond a number; who is told; their average."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import actckpt
from actckpt.checkpoint.retention import Keep
from tests.exact import same_bits
from tests.small_run import Small, advance, objects


def made_at(path: Path, steps: int, every: Any) -> list[int]:
    """The steps of the checkpoints that a run of so many steps makes, oldest first."""
    made = objects()
    with actckpt.Checkpointer(path, **made, every=every, keep_last=None) as run:
        advance(run, made, steps)
    return [c.step for c in reversed(run.list())]


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ([2, 3, 11, 90], [2, 3, 11]),
        ((5,), [5]),
        ("doubling", [1, 2, 4, 8]),
        (lambda step: step % 7 == 6, [6]),
    ],
)
def test_steps_that_no_number_says(every: Any, steps: list[int], tmp_path: Path) -> None:
    assert made_at(tmp_path, 12, every) == steps


@pytest.mark.parametrize("every", [[], [0], [2, "3"], [1.5], "epochs", {"a": 1}, True])
def test_what_says_no_steps(every: Any, tmp_path: Path) -> None:
    with pytest.raises(actckpt.ArgumentError, match="every"):
        made_at(tmp_path, 1, every)


def test_the_end_of_each_epoch(tmp_path: Path) -> None:
    made = objects()
    loader = DataLoader(TensorDataset(torch.randn(12, 2)), batch_size=4)
    arguments = {**made, "loader": loader, "every": "epoch", "keep_last": None}
    with actckpt.Checkpointer(tmp_path, **arguments) as run:
        for _, _batch in run.steps(epochs=3):
            advance(run, made, 1)
    assert [c.step for c in run.list()] == [9, 6, 3]
    # what was saved there begins the next epoch
    other = {**objects(seed=1), "loader": loader}
    with actckpt.Checkpointer(tmp_path, **other, every="epoch") as again:
        result = again.restore(6)
        assert (result.epoch, result.batch) == (2, 0)
        assert len([*again.steps(epochs=3)]) == 3


def test_a_loop_of_ones_own_has_no_epochs(tmp_path: Path) -> None:
    with (
        actckpt.Checkpointer(tmp_path, **objects(), every="epoch") as run,
        pytest.raises(actckpt.ArgumentError, match=r"call run.save\(\) there"),
    ):
        run.step()


def test_only_what_is_better(tmp_path: Path) -> None:
    made = objects()
    run = actckpt.Checkpointer(
        tmp_path, **made, every=1, keep_last=None, only_better=("loss", "min")
    )
    nan = float("nan")
    for loss in (nan, 3.0, 4.0, 2.0, 2.0, nan, 1.0):
        advance(run, made, 1, loss=loss)
    advance(run, made, 1)  # without the metric
    advance(run, made, 1, loss=5.0)
    run.save()  # always
    run.close()
    assert [c.step for c in run.list()] == [9, 7, 4, 2]


@pytest.mark.parametrize("goal", ["loss", ("loss",), ("loss", "least"), (1, "min")])
def test_goals_that_are_none(goal: Any, tmp_path: Path) -> None:
    with pytest.raises(actckpt.ArgumentError, match="only_better must be"):
        actckpt.Checkpointer(tmp_path, **objects(), only_better=goal)


def test_hours_and_days(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=None) as run:
        advance(run, made, 8)
    day, hour = 86_400, 3_600
    # newest first: three in one hour, one the hour before, one the day before, three long ago
    times = [9 * day + s for s in (900, 800, 700, -100, -day, -5 * day, -5 * day - 1, -6 * day)]
    found = [
        dataclasses.replace(c, manifest=dataclasses.replace(c.manifest, saved_at_s=float(at)))
        for c, at in zip(run.list(), times, strict=True)
    ]

    def kept(**how: Any) -> list[int]:
        return [c.step for c in Keep(1, **how)(found)]

    assert [int(t // hour) for t in times[:4]] == [216, 216, 216, 215]
    assert kept(hourly=2) == [8, 5]
    assert kept(hourly=3) == [8, 5, 4]
    assert kept(daily=2) == [8, 5]
    assert kept(daily=4) == [8, 5, 3, 2]
    assert kept(daily=9) == [8, 5, 3, 2]
    with pytest.raises(actckpt.ArgumentError, match="keep_daily must be at least 1"):
        Keep(1, daily=0)


def test_who_asks_is_told_of_each_in_the_thread_that_trains(tmp_path: Path) -> None:
    import threading

    told: list[tuple[int, int]] = []

    def on_saved(checkpoint: actckpt.Checkpoint) -> None:
        checkpoint.verify()
        told.append((checkpoint.step, threading.get_ident()))

    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=2, on_saved=on_saved) as run:
        advance(run, made, 5)
        run.save()
    assert [*dict(told)] == [2, 4, 5]
    assert {thread for _, thread in told} == {threading.get_ident()}


def test_the_size_is_known_before(tmp_path: Path) -> None:
    made = objects(width=300_000)
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        advance(run, made, 1)
        said = run.size_bytes
        assert run.save().size_bytes == pytest.approx(said, rel=0.02)


def averaged(path: Path, **how: Any) -> tuple[Small, actckpt.LoadedWeights]:
    torch.manual_seed(5)
    model = Small()
    return model, actckpt.average_weights(model, path, **how)


def test_the_average_of_checkpoints(tmp_path: Path) -> None:
    made = objects()
    states = []
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=None) as run:
        for _ in range(4):
            advance(run, made, 1)
            states.append({k: v.clone() for k, v in made["model"].state_dict().items()})
    model, loaded = averaged(tmp_path, last=3)
    assert loaded.kind == "the mean of 3 checkpoints"
    assert loaded.source.endswith("step-00000004")
    found = model.state_dict()
    for name, value in found.items():
        of = [s[name] for s in states[1:]]
        if not value.is_floating_point():
            assert int(value) == 4  # BatchNorm's count: the newest one's
            continue
        mean = torch.stack([v.double() for v in reversed(of)]).sum(0) / 3
        assert same_bits(value, mean.float()), name
        assert not same_bits(value, of[-1]), name
    # with batches, BatchNorm's statistics are those of the averaged weights
    batches = [torch.randn(6, 2) for _ in range(3)]
    model, _ = averaged(tmp_path, last=3, loader=batches)
    other, _ = averaged(tmp_path, last=3)
    update_bn(batches, other)
    assert all(same_bits(a, other.state_dict()[k]) for k, a in model.state_dict().items())
    assert not same_bits(model.state_dict()["norm.running_mean"], found["norm.running_mean"])


def test_what_has_no_average_changes_nothing(tmp_path: Path) -> None:
    for width in (3, 4):
        made = objects(width)
        with actckpt.Checkpointer(tmp_path / str(width), **made, every=None) as run:
            advance(run, made, 1)
            run.save()
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(actckpt.CheckpointMismatchError, match="have a mean"):
        actckpt.average_weights(model, [tmp_path / "3", tmp_path / "4"])
    with pytest.raises(actckpt.ArgumentError, match="at least one checkpoint"):
        actckpt.average_weights(model, [])
    with pytest.raises(actckpt.CheckpointError):
        actckpt.average_weights(model, tmp_path / "none")
    assert all(same_bits(a, before[k]) for k, a in model.state_dict().items())


def test_a_batch_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """After the weights are in, and a first batch has changed the statistics."""
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
    model = Small().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    momenta = [getattr(module, "momentum", 0) for module in model.modules()]
    with pytest.raises(RuntimeError, match="shape"):
        actckpt.average_weights(model, tmp_path, loader=[torch.randn(6, 2), torch.randn(6, 5)])
    assert all(same_bits(a, before[k]) for k, a in model.state_dict().items())
    assert [getattr(module, "momentum", 0) for module in model.modules()] == momenta
    assert not any(module.training for module in model.modules())


def test_an_average_of_a_model_with_hooks_is_the_callers_to_allow(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
    model = Small()
    model.register_load_state_dict_pre_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    with pytest.raises(actckpt.CheckpointMismatchError, match="this does not: the model itself"):
        actckpt.average_weights(model, tmp_path)
    report = actckpt.average_weights(model, tmp_path, strict="shapes")
    assert report.not_run == ("the model itself",)
