"""Lightning's Trainer under `MemoryBudget`: within the budget, and resumed to the last bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import actckpt

pytest.importorskip("peft")
L = pytest.importorskip("lightning")

from lightning.pytorch import callbacks as lightning_callbacks  # noqa: E402

from actckpt.integrations.lightning import MemoryBudget  # noqa: E402
from tests.fitted import (  # noqa: E402
    BUDGET_BYTES,
    KILLED_AT,
    Lit,
    Peaks,
    Stops,
    fit,
    fit_the_bar,
)
from tests.trainer_models import Rows, next_row_loss  # noqa: E402
from tests.trainer_runs import QUIET, Stopped, bits, is_same, killed, stop  # noqa: E402

pytestmark = QUIET


class Stream(IterableDataset[torch.Tensor]):
    """Without a length; Lightning reads it a batch ahead."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = Rows()
        return (rows[i] for i in range(len(rows)))


class Asking(Lit):
    """Whose schedule asks how many steps there are, and so for the loader, before all else."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class OnPlateau(Lit):
    """Whose schedule goes by a sum over the batches of an epoch; and whose hooks draw."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "loss_epoch"},
        }

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        torch.rand(3)


def averaging() -> Any:
    return lightning_callbacks.StochasticWeightAveraging(
        swa_lrs=5e-2, swa_epoch_start=1, annealing_epochs=2
    )


def moving() -> Any:
    return lightning_callbacks.EMAWeightAveraging(decay=0.9)


def accumulating() -> Any:
    return lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 3})


class ByHand(Lit):
    """Which runs backward and its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, _: int) -> Any:
        optimizer = self.optimizers()
        loss = next_row_loss(self.net(batch), batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss.detach()}


class Normed(Lit):
    """Whose statistics an average of weights needs: one more epoch, without a step."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(1), nn.Dropout(0.1), nn.Linear(8, 8))


class Counting(IterableDataset[torch.Tensor]):
    """A stream that says where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = Rows()
        while self.at < len(rows):
            self.at += 1
            yield rows[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def counting() -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(Counting(), 2)


# the module, its callbacks, settings, loader, and the batches after which training is stopped: an
# epoch has eleven
Situation = tuple[
    Callable[[], Any], tuple[Callable[[], Any], ...], dict[str, Any], Any, tuple[int, ...]
]
SITUATIONS: dict[str, Situation] = {
    "shuffled": (Lit, (), {}, None, (8, 12)),
    "a stream": (Lit, (), {}, lambda: DataLoader(Stream(), 2), (8, 12)),
    "workers that persist": (
        Lit,
        (),
        {},
        lambda: DataLoader(Rows(), 2, shuffle=True, num_workers=1, persistent_workers=True),
        (12,),
    ),
    "asked for its steps": (Asking, (), {}, None, (8,)),
    "on a plateau": (OnPlateau, (), {}, None, (8, 12)),
    "validated within an epoch": (
        Lit,
        (),
        {"val_check_interval": 4, "accumulate_grad_batches": 1},
        None,
        (5, 12),
    ),
    "a part of its batches": (
        Lit,
        (),
        {"limit_train_batches": 7, "accumulate_grad_batches": 4},
        None,
        (6, 9),
    ),
    "averaged": (Lit, (averaging,), {}, None, (12, 20)),
    "averaged, in its epoch for statistics": (Normed, (averaging,), {}, None, (36, 40)),
    "optimized by hand": (
        ByHand,
        (),
        {"accumulate_grad_batches": 1, "gradient_clip_val": None},
        None,
        (5, 12),
    ),
    "a stream that says where it is": (Lit, (), {}, counting, (5, 12)),
    "a moving average": (Lit, (moving,), {}, None, (8,)),
    "other accumulation": (Lit, (accumulating,), {"accumulate_grad_batches": 1}, None, (16,)),
}


def kept(folder: Path) -> MemoryBudget:
    return MemoryBudget(None, checkpoints=folder, every=1)


@pytest.mark.kind("Lightning's Trainer", bits=True, resumed="exact")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(situation: str, tmp_path: Path) -> None:
    make, callbacks, settings, loader, stops = SITUATIONS[situation]

    def run(*besides: Any) -> Any:
        model = make()
        try:
            given = None if loader is None else loader()
            fit(model, *besides, *(c() for c in callbacks), loader=given, **settings)
        except Stopped:
            pass
        return model

    whole = run()
    for after in stops:
        folder = tmp_path / str(after)
        first = run(kept(folder), Stops(after, stop))
        assert len(first.history) < len(whole.history)
        budget = kept(folder)
        again = run(budget)
        assert budget.resumed is not None
        assert budget.resumed.bit_exact, budget.resumed.inexact
        rest = again.history
        assert 0 < len(rest) < len(whole.history)
        assert rest == whole.history[-len(rest) :], after
        assert is_same(bits(again), bits(whole)), after


@pytest.mark.kind("Lightning's Trainer", bits=True, peak="bounded", resumed="exact")
def test_killed_in_the_middle_of_an_epoch_under_a_tight_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untouched, measured = Peaks(), Peaks()
    whole, _ = fit_the_bar(None, untouched)
    killed("tests.fitted", tmp_path)
    with caplog.at_level(logging.INFO, logger="actckpt"):
        again, budget = fit_the_bar(tmp_path, measured)
    assert "planning again" not in caplog.text
    resumed = budget.resumed
    assert resumed is not None
    assert resumed.bit_exact, resumed.inexact
    assert 5 < resumed.step <= KILLED_AT // 2
    rest = again.history
    assert rest == whole.history[-len(rest) :]
    assert is_same(bits(again), bits(whole))
    # planning is no part of a step
    assert max(measured.peaks[1:]) <= BUDGET_BYTES < max(untouched.peaks[1:])
    assert budget.run.verified.difference is None


def test_a_run_that_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    whole = Lit()
    fit(whole, kept(tmp_path), averaging())
    again = Lit()
    trainer = fit(again, kept(tmp_path), averaging())
    assert again.history == []
    assert is_same(bits(again), bits(whole))
    assert trainer.current_epoch == 3


def test_another_way_to_go_on_and_other_loaders_are_refused(tmp_path: Path) -> None:
    model = Lit()
    trainer = fit(model, max_epochs=1)
    path = tmp_path / "theirs.ckpt"
    trainer.save_checkpoint(path)
    trainer = L.Trainer(max_epochs=2, logger=False, accelerator="cpu", callbacks=[kept(tmp_path)])
    with pytest.raises(actckpt.CheckpointError, match=r"ckpt_path=.* beside checkpoints="):
        trainer.fit(Lit(), DataLoader(Rows(), 2), ckpt_path=path, weights_only=False)
    two = [DataLoader(Rows(), 2), DataLoader(Rows(), 2)]
    with pytest.raises(actckpt.CheckpointError, match=r"2 loaders that are read at once"):
        fit(Lit(), kept(tmp_path), loader=two)
    with pytest.raises(actckpt.CheckpointError, match=r"reload_dataloaders_every_n_epochs"):
        fit(Lit(), kept(tmp_path), reload_dataloaders_every_n_epochs=1)
    with pytest.raises(actckpt.PlanError, match=r"nothing to do"):
        MemoryBudget(None)
    assert not list(tmp_path.glob("step-*"))


def test_what_is_optimized_by_hand_has_no_plan() -> None:
    with pytest.raises(actckpt.PlanError, match=r"optimizes manually.*MemoryBudget\(None, "):
        fit(ByHand(), MemoryBudget("8GB"), accumulate_grad_batches=1, gradient_clip_val=None)


def test_what_does_not_fit_is_said_before_the_first_step() -> None:
    model = Lit()
    before = bits(model)
    with pytest.raises(actckpt.BudgetError):
        fit(model, MemoryBudget(1e-6))
    assert is_same(bits(model), before)
    assert not {"forward", "training_step"} & set(vars(model))
