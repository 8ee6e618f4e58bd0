"""transformers' Trainer under `MemoryBudget`: within the budget, and resumed to the last bit."""

from __future__ import annotations

import re
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import actckpt

pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from actckpt.integrations.replicas import budget_left  # noqa: E402
from actckpt.integrations.trainer_models import models_beside  # noqa: E402
from actckpt.integrations.transformers import MemoryBudget  # noqa: E402
from tests.trained import (  # noqa: E402
    BAR,
    KILLED_AT,
    Stops,
    history,
    make_adapted,
    make_trainer,
    tight,
)
from tests.trainer_models import Texts  # noqa: E402
from tests.trainer_runs import QUIET, Stopped, bits, is_same, killed, stop  # noqa: E402

pytestmark = QUIET


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """Without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        texts = Texts()
        return (texts[i] for i in range(len(texts)))


STEPWISE = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}
AT_EPOCHS = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
# settings, data, and the steps after which training is stopped: the first epoch has four
SITUATIONS: dict[str, tuple[dict[str, Any], Any, tuple[int, ...]]] = {
    "shuffled": ({}, None, (5,)),
    "at the epoch's end": (AT_EPOCHS, None, (4,)),
    "stopped early": (STEPWISE, None, (6,)),
    "workers that persist": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        None,
        (4,),
    ),
    "a stream's second pass": ({"max_steps": 9}, Stream(), (5,)),
}


def budget(folder: Path) -> MemoryBudget:
    return MemoryBudget(None, policy="full", checkpoints=folder / "run", every=1)


@pytest.mark.kind("transformers' Trainer", bits=True, resumed="exact")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_training_goes_on_as_if_it_had_not_been_stopped(situation: str, tmp_path: Path) -> None:
    settings, data, stops = SITUATIONS[situation]

    def made(where: Path, *callbacks: Any) -> Any:
        early = [transformers.EarlyStoppingCallback(2)] if settings is STEPWISE else []
        return make_trainer(where, *callbacks, *early, data=data, **settings)

    whole = made(tmp_path)
    result = whole.train()
    assert (settings is STEPWISE) == (whole.state.global_step < whole.state.max_steps)
    for after in stops:
        folder = tmp_path / str(after)
        with pytest.raises(Stopped):
            made(folder, budget(folder), Stops(after, stop)).train()
        callback = budget(folder)
        trainer = made(folder, callback)
        again = trainer.train()
        assert callback.resumed is not None
        assert callback.resumed.step == after
        assert callback.resumed.bit_exact, callback.resumed.inexact
        assert history(trainer) == history(whole)
        assert again.training_loss == result.training_loss
        assert is_same(bits(trainer.model), bits(whole.model))
        assert callback.report.plan.regions


@pytest.mark.kind("transformers' Trainer", bits=True, peak="bounded", resumed="exact")
def test_killed_in_the_middle_of_an_epoch_under_a_tight_budget(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, model=make_adapted(), **BAR)
    whole.train()
    killed("tests.trained", tmp_path)
    callback = tight(tmp_path)
    trainer = make_trainer(tmp_path, callback, model=make_adapted(), **BAR)
    trainer.train()
    assert callback.resumed is not None
    assert callback.resumed.bit_exact, callback.resumed.inexact
    # the last save may have been under way
    assert 4 < callback.resumed.step <= KILLED_AT
    assert history(trainer) == history(whole)
    assert is_same(bits(trainer.model), bits(whole.model))
    report = callback.report
    planned, untouched = report.planned.predicted, report.baseline.predicted
    assert planned.added_bytes is not None
    assert untouched.added_bytes is not None
    assert planned.added_bytes <= 200_000 < untouched.added_bytes


def test_another_way_to_go_on_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "num_train_epochs": 1, "save_strategy": "steps"}
    make_trainer(tmp_path, save_steps=1, **settings).train()
    trainer = make_trainer(tmp_path, budget(tmp_path), **settings)
    with pytest.raises(actckpt.CheckpointError, match="resume_from_checkpoint="):
        trainer.train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path, budget(tmp_path), ignore_data_skip=True, **settings)
    with pytest.raises(actckpt.CheckpointError, match="ignore_data_skip=True"):
        trainer.train()
    assert not (tmp_path / "run").exists()


class Averaging(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Whose loss goes by those before, which it keeps in an attribute."""

    mean = 0.0
    last: Any = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        self.last = [{"loss": loss.detach()}]
        return loss * self.mean


class Remembering(Averaging):
    """Which keeps them in what no checkpoint holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lines: Any = {}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.lines = {"last": deque([loss.item()])}
        return loss


@pytest.mark.kind("a Trainer of the user's own", bits=True, resumed="exact")
@pytest.mark.parametrize("kind", [Averaging, Remembering])
def test_what_a_trainer_of_the_users_own_keeps(kind: Any, tmp_path: Path) -> None:
    def made(*callbacks: Any) -> Any:
        return make_trainer(tmp_path, *callbacks, kind=kind, max_steps=5)

    whole = made()
    whole.train()
    with pytest.raises(Stopped):
        made(budget(tmp_path), Stops(2, stop)).train()
    callback = budget(tmp_path)
    trainer = made(callback)
    trainer.train()
    assert callback.resumed is not None
    assert history(trainer) == history(whole)
    assert is_same(bits(trainer.model), bits(whole.model))
    assert (trainer.mean, trainer.last) == (whole.mean, whole.last)
    if kind is Averaging:
        assert callback.resumed.bit_exact, callback.resumed.inexact
    else:
        (reason,) = callback.resumed.inexact
        assert reason == ("Remembering.lines changes as it trains, and no checkpoint can hold it")


def test_a_training_is_finished_and_then_made_longer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 1, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path, max_steps=5, **settings)
    whole.train()
    callback = budget(tmp_path)
    trainer = make_trainer(tmp_path, callback, Stops(1, stop), max_steps=3, **settings)
    with pytest.raises(Stopped):
        trainer.train()
    trainer.train()  # the same one goes on
    report = callback.report
    assert trainer.train().global_step == 3  # and has nothing left to do
    assert callback.resumed is not None
    assert callback.resumed.step == 3
    assert callback.report == report
    assert "_run_epoch" not in vars(trainer)
    trainer = make_trainer(tmp_path, budget(tmp_path), max_steps=5, **settings)
    trainer.train()
    assert history(trainer) == history(whole)
    assert is_same(bits(trainer.model), bits(whole.model))


def test_what_lies_beside_the_model_is_taken_off_the_budget() -> None:
    model, reference = nn.Linear(100, 10), nn.Linear(100, 10).requires_grad_(False)
    trainer = types.SimpleNamespace(model=model, ref_model=reference, losses=[nn.Linear(10, 10)])
    beside = models_beside(trainer, model)
    assert budget_left("1MB", model, beside) == "0.99508MB"
    assert not models_beside(types.SimpleNamespace(model=model), model)
    assert budget_left("1MB", model, {}) == "1MB"
    with pytest.raises(actckpt.BudgetError, match="ref_model"):
        budget_left("4kB", model, beside)
    left = budget_left("13kB", model, beside)  # 4920 B are beside, 8080 B are left
    with pytest.raises(actckpt.BudgetError) as found:
        actckpt.optimize(model, left, batch=torch.ones(4, 100), loss_fn=torch.sum)
    needed = found.value.smallest_bytes
    assert needed is not None
    raised = re.search(r"after 4.92 kB beside .* Raise budget_gb to '([\d.]+)kB'", str(found.value))
    assert raised is not None
    assert 0 <= float(raised[1]) * 1000 - needed - 4920 < 100


def test_several_devices_are_refused() -> None:
    args: Any = types.SimpleNamespace(world_size=1, n_gpu=2)
    state: Any = None
    with pytest.raises(actckpt.PlanError, match="this training has one process with 2 devices"):
        budget(Path("runs")).on_train_begin(args, state, state, model=nn.Linear(1, 1))
