"""The public object on runs of a few kilobytes: saving, keeping, going back, arguments."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.checkpoint.retention import Keep
from tests.small_run import advance, names, objects, state
from tests.test_checkpoint_encoding import same


def test_an_empty_directory_resumes_nothing(tmp_path: Path) -> None:
    made = objects()
    before = state(made)
    with actckpt.Checkpointer(tmp_path / "new" / "run", **made) as run:
        assert run.resume() is None
        assert run.list() == []
    assert same(state(made), before)


def test_cadence_and_retention(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(
        tmp_path, **made, every=2, keep_last=2, keep_every=6, keep_best=("loss", "min", 1)
    ) as run:
        for loss in (5, 1, math.nan, 4, 3, 3, 2, 9, math.inf, 8):
            advance(run, made, 1, loss=loss)
        assert names(run) == [f"step-{n:08d}" for n in (10, 8, 6, 2)]
        best = run.best()
        assert best is not None
        assert (best.step, best.metrics) == (2, {"loss": 1.0})
        assert run.best("loss", "max").step == 8  # type: ignore[union-attr]
        assert run.best("unheard of") is None


def test_what_is_pinned_stays(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=1) as run:
        advance(run, made, 1)
        run.pin(1)
        advance(run, made, 2)
        assert names(run) == ["step-00000003", "step-00000001"]
        assert [c.pinned for c in run.list()] == [False, True]
        run.pin(1, False)
        advance(run, made, 1)
        assert names(run) == ["step-00000004"]
        with pytest.raises(actckpt.CheckpointError, match="step 1; there are: 4"):
            run.pin(1)
    assert sorted(os.listdir(tmp_path)) == [".lock", "journal.jsonl", "step-00000004"]


def test_a_state_is_saved_once(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
        assert run.save().path.name == "step-00000001"
        assert run.save(tag="final").path.name == "step-00000001.1"
        assert [c.tag for c in run.list()] == ["final", ""]


def test_a_state_that_was_changed_without_a_step_is_saved_again(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=None) as run:
        advance(run, made, 1)
        run.save()
        with torch.no_grad():
            made["model"].first.weight.data[0, 0] = 7.0  # which no version counter tells
        assert run.save().path.name == "step-00000001.1"
        assert run.save().path.name == "step-00000001.1"
        made["optimizer"].param_groups[0]["lr"] = 0.5
        assert run.save().path.name == "step-00000001.2"
        made["model"](torch.randn(5, 2))  # nothing but random numbers and running statistics
        assert run.save().path.name == "step-00000001.3"
        run.restore(only=["model"])
        run.save()
        torch.rand(1)
        run.restore(1, only=["model"])
        assert run.save().path.name == "step-00000001.4"


def test_a_resumed_run_that_was_changed_is_saved(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=None) as run:
        assert run.resume() is not None
        assert run.save().path.name == "step-00000001"
        made["optimizer"].param_groups[0]["lr"] = 0.5
        assert run.save().path.name == "step-00000001.1"


def test_a_model_that_filters_its_state_is_resumed(tmp_path: Path) -> None:
    class Filtered(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            found = super().state_dict(*args, **kwargs)
            return {name: x for name, x in found.items() if "bias" in name}

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, strict=False)

    model = Filtered(2, 3)
    with actckpt.Checkpointer(tmp_path, model=model) as run:
        run.step()
    other = Filtered(2, 3)
    with actckpt.Checkpointer(tmp_path, model=other) as run:
        assert run.resume() is not None
    assert torch.equal(other.bias, model.bias)
    assert not torch.equal(other.weight, model.weight)


def test_versions_of_every_module_reach_it(tmp_path: Path) -> None:
    class Versioned(nn.Module):
        _version = 7
        seen: int | None = None

        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any):  # type: ignore[no-untyped-def]
            self.seen = metadata.get("version")

    with actckpt.Checkpointer(tmp_path, model=Versioned(), ema=Versioned()) as run:
        run.step()
    made: dict[str, Any] = {"model": Versioned(), "ema": Versioned()}
    with actckpt.Checkpointer(tmp_path, **made) as run:
        run.resume()
    assert [m.seen for m in made.values()] == [7, 7]


def test_buffers_that_are_no_part_of_the_state_are_put_back(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.inner.register_buffer("calls", torch.zeros(2), persistent=False)
            self.register_buffer("cache", None, persistent=False)

    model: Any = Counting()
    alias = model.inner.calls
    model.inner.calls += 3
    model.cache = torch.arange(5)
    model.register_buffer("late", torch.ones(1), persistent=False)
    with actckpt.Checkpointer(tmp_path, model=model) as run:
        run.step()
        model.inner.calls.zero_()
        model.cache = torch.zeros(9)
        run.restore()
    assert model.inner.calls is alias
    other: Any = Counting()
    with actckpt.Checkpointer(tmp_path, model=other) as run:
        assert run.resume() is not None
    for found in (model, other):
        assert found.inner.calls.tolist() == [3, 3]
        assert found.cache.tolist() == [0, 1, 2, 3, 4]
        assert found.late.tolist() == [1]
        assert set(found.state_dict()) == {"inner.weight", "inner.bias"}


def test_a_checkpoint_that_is_gone_or_damaged_is_made_again(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        advance(run, made, 1)
        first = run.save()
        shutil.rmtree(first.path)
        second = run.save()
        second.verify()
        weights = second.path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        third = run.save()
        assert third.path.name == "step-00000001.1"
        third.verify()
        assert run.save() == third


def test_metrics_of_a_save_belong_to_the_state(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        advance(run, made, 1, loss=2.0)
        assert run.save(metrics={"val_loss": 0.5}).metrics == {"loss": 2.0, "val_loss": 0.5}
        # known to belong to it only afterwards
        assert run.save(metrics={"accuracy": 0.25}).metrics == run.list()[0].metrics
        assert run.list()[0].metrics == {"loss": 2.0, "val_loss": 0.5, "accuracy": 0.25}
        advance(run, made, 1)
        assert run.save().metrics == {}


def test_a_run_taken_back_goes_on_from_there(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 3)
        assert run.restore(1).step == 1
        assert run.step_count == 1
        advance(run, made, 1)
        expected = state(made)
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.checkpoint.path.name == "step-00000002.1"
        assert same(state(made), expected)


def test_only_some_items(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made) as run:
        advance(run, made, 2)
        run.save()
    model = objects(seed=1)["model"]
    with actckpt.Checkpointer(tmp_path, model=model) as run:
        with pytest.raises(actckpt.CheckpointMismatchError, match="holds optimizer"):
            run.resume()
        run.restore(only=["model"])
        assert run.step_count == 0
    assert same(model.state_dict(), made["model"].state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": "10 parsecs"}, "every must be"),
        ({"verify": "no"}, "verify must be one of full, manifest"),
        ({"keep_last": 0}, "keep_last must be"),
        ({"keep_best": ("loss", "best", 1)}, "keep_best must be"),
        ({"keep_every": -1}, "keep_every must be"),
        ({"scheduler": 3}, "scheduler must have state_dict"),
        ({"extra": {"a/b": nn.Linear(1, 1)}}, "cannot be the name of a file"),
        ({"model": 3}, "model must be"),
        ({"loader": 5}, "loader must be a DataLoader, or another iterable"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        actckpt.Checkpointer(tmp_path, **{**objects(), **arguments})
    assert os.listdir(tmp_path) == []


def test_the_loss_itself_is_a_metric(tmp_path: Path) -> None:
    with actckpt.Checkpointer(tmp_path, **objects()) as run:
        run.step(metrics={"loss": torch.tensor(1.5, requires_grad=True) * 2})
        assert run.save().metrics == {"loss": 3.0}


def test_metrics_are_numbers(tmp_path: Path) -> None:
    run = actckpt.Checkpointer(tmp_path, **objects())
    with pytest.raises(TypeError, match="metric loss must be a number"):
        run.step(metrics={"loss": torch.ones(2)})


def test_keep_never_lets_the_newest_go(tmp_path: Path) -> None:
    assert Keep(last=1)([]) == []
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=None) as run:
        for loss in (1.0, math.nan, 3.0, 2.0):
            advance(run, made, 1, loss=loss)
        found = run.list()
    for settings in ((1, None, None), (1, ("loss", "min", 1), None), (1, ("other", "max", 2), 7)):
        keep = Keep(*settings)
        for first in range(len(found)):
            assert keep(found[first:])[0] is found[first]
    kept = Keep(1, ("loss", "min", 1), 2)(found)
    assert [c.step for c in kept] == [4, 2, 1]


def test_no_pickle_on_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was written or read")

    names = ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")
    for owner, name in (*((pickle, n) for n in names), (torch, "save"), (torch, "load")):
        monkeypatch.setattr(owner, name, reached)
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, config={"seed": 1}) as run:
        advance(run, made, 2)
        expected = state(made)
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made, every=1, config={"seed": 1}) as run:
        assert run.resume() is not None
    assert same(state(made), expected)
