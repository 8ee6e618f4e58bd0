"""LightningModules: a real Trainer calls their ``training_step``, and that is what is planned."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import actckpt
from actckpt.errors import PlanError
from actckpt.profiler.meter import AllocatorMeter
from tests.models.blocks import chain, rows
from tests.suite import seeded

L = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.usefixtures("flat_profile"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
]
STEPS, SIZE = 4, 64


class Lit(L.LightningModule):  # type: ignore[misc, name-defined]  # it may be absent
    def __init__(self) -> None:
        super().__init__()
        self.net = chain(4, 0.1)()

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss: torch.Tensor = (self(x) - y).square().mean()
        if batch_idx < 2:  # what logging keeps is no part of a plan
            self.log("loss", loss)
            self.log_dict({"number": float(batch_idx)})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def make() -> Any:
    return seeded(Lit)()


def batch() -> Any:
    return [rows(SIZE), rows(SIZE).flip(0)]


class Peaks(L.Callback):  # type: ignore[misc, name-defined]
    """What training_step and backward of each step allocate at their highest."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.meter: Any = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.meter = AllocatorMeter(torch.device("cpu"))
        self.meter.__enter__()

    def on_after_backward(self, *_: Any) -> None:
        if self.meter is not None:
            self.meter.__exit__(None, None, None)
            self.peaks.append(self.meter.peak_bytes)
            self.meter = None


def fit(model: Any, **more: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[int]]:
    """Trains for `STEPS` steps; weights and metrics, and what each step allocated."""
    torch.manual_seed(5)
    data = torch.utils.data.TensorDataset(
        torch.randn(STEPS * SIZE, 8), torch.randn(STEPS * SIZE, 8)
    )
    peaks = Peaks()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[peaks], **more,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, SIZE))
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return weights, dict(trainer.callback_metrics), peaks.peaks


@pytest.fixture(scope="module")
def untouched() -> Any:
    return fit(make())


@contextmanager
def nothing_said(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="actckpt"):
        yield
    assert not [r.message for r in caplog.records if r.name == "actckpt"]


@pytest.mark.kind("LightningModule under a Trainer", bits=True, peak="within")
@pytest.mark.parametrize("at_once", [True, False])
def test_training_step_is_planned(
    at_once: bool, untouched: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weights, metrics, peaks = untouched
    most = actckpt.measure(make(), batch(), steps=1).added_bytes
    budget = round(0.75 * most)
    model = make()
    kept = {"log", "log_dict"} & set(model.__dict__)
    with nothing_said(caplog):
        actckpt.optimize(
            model, budget / 1e9, scope="activations", batch=batch() if at_once else None
        )
        found, logged, planned_peaks = fit(model)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert logged == metrics
    assert {"log", "log_dict"} & set(model.__dict__) == kept
    gradients = sum(p.nbytes for p in model.parameters())
    # the first step of a lazy plan plans, the second one learns the optimizer
    assert max(planned_peaks[2:]) <= budget + gradients < max(peaks[2:])
    assert actckpt.measure(model, batch(), steps=1).added_bytes <= budget
    actckpt.revert(model)
    assert not {"forward", "training_step"} & set(model.__dict__)


def test_the_numbers_of_batches_do_not_make_new_plans(caplog: pytest.LogCaptureFixture) -> None:
    model = actckpt.optimize(make(), 1.0, batch=batch())
    with caplog.at_level(logging.INFO, logger="actckpt"):
        fit(model)
    # the optimizer, and gradients that a Trainer keeps until training_step has ended
    assert caplog.text.count("planning again") == 1


def test_under_mixed_precision() -> None:
    weights, _, _ = fit(make(), precision="bf16-mixed")
    model = actckpt.optimize(make(), None, policy="full")
    found, _, _ = fit(model, precision="bf16-mixed")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert actckpt.report(model).plan.regions
    assert not torch.is_autocast_enabled("cpu")


def test_one_in_a_loop_of_its_own_is_planned_by_its_forward() -> None:
    def train(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            model(rows(SIZE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    expected = train(make())
    model = make()
    found = train(actckpt.optimize(model, None, policy="full"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert actckpt.report(model).plan.regions


def test_what_cannot_be_planned_is_refused_at_the_call() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(PlanError, match=r"training_step makes the loss"):
        actckpt.optimize(make(), 1.0, batch=rows(SIZE), loss_fn=torch.sum)
    with pytest.raises(PlanError, match=r"training_step makes the loss"):
        actckpt.find_max_batch(make(), 1.0, rows, loss_fn=torch.sum)
    for given in (batch(), None):
        model = Manual()
        with pytest.raises(PlanError, match=r"optimizes manually"):
            actckpt.optimize(model, 1.0, batch=given)
        assert not {"forward", "training_step"} & set(model.__dict__)


def test_the_module_inside_as_before(untouched: Any) -> None:
    model = make()
    actckpt.optimize(model.net, None, policy="full")
    found, _, _ = fit(model)
    assert all(torch.equal(found[name], untouched[0][name]) for name in found)
    assert actckpt.report(model.net).plan.regions


def test_the_largest_batch_and_a_trace() -> None:
    graph = actckpt.trace(make(), batch())
    assert graph.loss_seen
    found = actckpt.find_max_batch(make(), 1.0, lambda n: [rows(n), rows(n)], limit=2)
    assert found.largest == 2
