"""A loop with accelerate under `MemoryBudget`: within the budget, and resumed to the last bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import actckpt

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from actckpt.integrations.accelerate import MemoryBudget
from tests.accelerated import (
    BUDGET_BYTES,
    KILLED_AT,
    budgeted,
    objects,
    train,
    untouched,
)
from tests.trainer_runs import QUIET, Stopped, bits, is_same, killed

pytestmark = [*QUIET, pytest.mark.usefixtures("fresh_accelerator")]


@pytest.mark.kind("a loop with accelerate", bits=True, peak="bounded", resumed="exact")
def test_killed_in_the_middle_of_an_epoch_under_a_tight_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses, whole = untouched(workers=2)
    killed("tests.accelerated", tmp_path)
    with caplog.at_level(logging.INFO, logger="actckpt"):
        rest, again, budget = budgeted(tmp_path, workers=2, seed=4)
    assert "planning again" not in caplog.text
    assert budget.resumed is not None
    assert budget.resumed.bit_exact, budget.resumed.inexact
    assert 5 < budget.resumed.step < KILLED_AT // 2
    assert rest == losses[-len(rest) :]
    assert is_same(bits(again), bits(whole))
    report = actckpt.report(again)
    planned, baseline = report.planned.predicted, report.baseline.predicted
    assert planned.peak_bytes <= BUDGET_BYTES < baseline.peak_bytes
    assert budget.run is not None
    assert budget.run.verified.difference is None


@pytest.mark.kind("a loop with accelerate", bits=True, resumed="exact")
def test_a_stateful_loader_goes_on_in_the_order_of_its_epoch(tmp_path: Path) -> None:
    configuration: dict[str, Any] = {"use_stateful_dataloader": True}

    def stop(batches: int) -> None:
        if batches == 17:
            raise Stopped

    losses, whole = untouched(**configuration)
    with pytest.raises(Stopped):
        budgeted(tmp_path, stop, **configuration)
    rest, again, budget = budgeted(tmp_path, seed=4, **configuration)
    assert budget.resumed is not None
    assert budget.resumed.bit_exact, budget.resumed.inexact
    assert rest == losses[-len(rest) :]
    assert is_same(bits(again), bits(whole))


@pytest.mark.kind("a loop with accelerate", bits=True)
def test_before_and_after_prepare(caplog: pytest.LogCaptureFixture) -> None:
    losses, whole = untouched()
    for before in (True, False):
        accelerator, model, optimizer, loader, schedule = objects()

        def optimize(model: Any = model, optimizer: Any = optimizer) -> None:
            actckpt.optimize(
                model, BUDGET_BYTES / 1e9, optimizer=optimizer, accumulate=True, policy="calls"
            )

        if before:
            optimize()
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        if not before:
            optimize(model, optimizer)
        batches = (batch for _ in range(3) for batch in loader)
        with caplog.at_level(logging.INFO, logger="actckpt"):
            assert train(accelerator, model, optimizer, schedule, batches) == losses
        assert "planning again" not in caplog.text
        assert is_same(bits(model), bits(whole))
        assert actckpt.report(model).planned.predicted.peak_bytes <= BUDGET_BYTES


def test_steps_come_after_prepare() -> None:
    accelerator, *_ = objects()
    with pytest.raises(actckpt.CheckpointError, match=r"call prepare"):
        next(MemoryBudget(accelerator, 1.0).steps(epochs=1))
