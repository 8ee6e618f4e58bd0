"""What the three MemoryBudgets are given: wrong arguments at once, budgets in their own unit."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import actckpt
from actckpt.units import parse_bytes, unit_of

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

from actckpt.integrations import accelerate as for_accelerate  # noqa: E402
from actckpt.integrations import lightning as for_lightning  # noqa: E402
from actckpt.integrations import transformers as for_transformers  # noqa: E402
from tests.messages import said  # noqa: E402
from tests.trained import make_small, make_trainer  # noqa: E402
from tests.trainer_runs import QUIET, bits, is_same  # noqa: E402

pytestmark = [*QUIET, pytest.mark.usefixtures("fresh_accelerator")]


def with_accelerator(budget_gb: Any, **settings: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True)
    return for_accelerate.MemoryBudget(accelerator, budget_gb, **settings)


BUDGETS: dict[str, Callable[..., Any]] = {
    "transformers": for_transformers.MemoryBudget,
    "lightning": for_lightning.MemoryBudget,
    "accelerate": with_accelerator,
}
# arguments, the error, and what it says
REFUSED: dict[str, tuple[tuple[Any, dict[str, Any]], type[Exception], list[str]]] = {
    "a budget in bytes": ((8e9, {}), actckpt.BudgetError, ["8e9 GB", "Did you mean 8?"]),
    "a budget below zero": ((-1, {}), actckpt.BudgetError, ["positive", "-1"]),
    "a unit that is none": (("8 gigs", {}), actckpt.BudgetError, ["'8 gigs'", "8GiB"]),
    "more than all": (("180%", {}), actckpt.BudgetError, ["'180%'", "at most 100%"]),
    "nothing at all": ((None, {}), actckpt.PlanError, ["nothing to do", "checkpoints="]),
    "a policy": ((1, {"policy": "best"}), actckpt.PlanError, ["'best'", "auto"]),
    "a policy that is a number": ((1, {"policy": 3}), actckpt.PlanError, ["a callable", "int"]),
    "a scope": ((1, {"scope": "epoch"}), actckpt.PlanError, ["'epoch'", "'step'"]),
    "every epoch": (
        (1, {"checkpoints": "runs", "every": "epoch"}),
        actckpt.ArgumentError,
        ["'epoch'", "every=len(loader)"],
    ),
    "keeps none": ((1, {"keep_last": 0}), actckpt.ArgumentError, ["keep_last", "0"]),
    "keeps a name": ((1, {"keep_best": "loss"}), actckpt.ArgumentError, ['("val_loss", "min", 1)']),
    "keeps a number": ((1, {"keep_best": 1}), actckpt.ArgumentError, ["keep_best", "found 1"]),
    "a bucket": (
        (1, {"checkpoints": "s3://runs"}),
        actckpt.ArgumentError,
        ["s3://runs is a URL", "mounted share"],
    ),
    "no directory": ((1, {"checkpoints": 5}), actckpt.ArgumentError, ["a directory", "5"]),
    "a file": ((1, {"checkpoints": __file__}), actckpt.ArgumentError, ["is a file"]),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_told_in_the_constructor(name: str, budget: str) -> None:
    (budget_gb, settings), kind, parts = REFUSED[name]
    said(kind, parts, lambda: BUDGETS[budget](budget_gb, **settings))


def test_an_accelerator_comes_first() -> None:
    wrong: Any = "8GB"
    said(
        actckpt.ArgumentError,
        ["MemoryBudget(accelerator, '8GB')", "found '8GB'"],
        lambda: for_accelerate.MemoryBudget(wrong, None, checkpoints="runs"),
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_found_has_the_same_names(budget: str) -> None:
    made = BUDGETS[budget](1)
    assert (made.run, made.resumed) == (None, None)
    said(actckpt.PlanError, ["nothing was planned yet", "once "], lambda: made.report)
    alone = BUDGETS[budget](None, checkpoints="runs")
    said(actckpt.PlanError, ["without a budget"], lambda: alone.report)


def test_checkpoints_alone_under_trainer(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, max_steps=3)
    whole.train()
    budget = for_transformers.MemoryBudget(None, checkpoints=tmp_path / "run", every=1)
    trainer = make_trainer(tmp_path, budget, max_steps=3, activation_checkpointing=False)
    trainer.train()
    assert budget.run is not None
    assert budget.run.step_count == 3
    assert is_same(bits(trainer.model), bits(whole.model))
    again = for_transformers.MemoryBudget(None, checkpoints=tmp_path / "run")
    make_trainer(tmp_path, again, max_steps=3).train()
    assert again.resumed is not None
    assert again.resumed.step == 3


def test_checkpoints_alone_under_accelerate(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        budget = with_accelerator(None, checkpoints=tmp_path, every=1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        data: Any = torch.randn(6, 4)
        loader: Any = DataLoader(data, 2, shuffle=True)
        model, optimizer, _, none = budget.prepare(model, optimizer, loader)
        assert none is None
        losses: list[float] = []
        for _, batch in budget.steps(epochs=2):
            if len(losses) == steps:
                break
            loss = model(batch).square().mean()
            budget._accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, budget

    first, _ = trained(4)
    rest, budget = trained(9)
    assert budget.resumed is not None
    assert (budget.resumed.step, len(rest)) == (4, 2)
    assert (budget.resumed.bit_exact, budget.run.verified.difference) == (True, None)
    assert len(first) == 4


# what was given, a count, as it is written in an error, and as an argument
WRITTEN: list[tuple[Any, int, str, str]] = [
    (0.95, 950_000, "0.000950 GB", "0.000950"),
    ("80%", 16_000_000_000, "16.000 GB", "16.000"),
    ("8GB", 3_412_000_001, "3.412 GB", "'3.413GB'"),
    ("512MB", 950_000, "0.950 MB", "'0.950MB'"),
    ("512mb", 207_615_000, "207.62 MB", "'207.62MB'"),
    ("900 kB", 950_123, "950.1 kB", "'950.2kB'"),
    ("8GiB", 3 * 2**29, "1.500 GiB", "'1.500GiB'"),
    ("12345B", 950, "950 B", "'950B'"),
]


@pytest.mark.parametrize(("asked", "count", "text", "argument"), WRITTEN)
def test_bytes_in_the_unit_that_was_given(asked: Any, count: int, text: str, argument: str) -> None:
    unit = unit_of(asked)
    assert unit.text(count) == text
    assert unit.argument(count) == argument
    assert parse_bytes(unit.exactly(count)) == count
    assert parse_bytes(argument.strip("'")) >= count


@pytest.mark.parametrize("asked", ["20kB", "0.02 MB", 2e-5])
def test_a_budget_error_is_written_in_the_unit_that_was_given(asked: Any) -> None:
    unit = unit_of(asked)
    assert unit.written == isinstance(asked, str)
    model = make_small()
    words = torch.randint(0, 64, (2, 24))
    with pytest.raises(actckpt.BudgetError) as caught:
        actckpt.optimize(model, asked, batch={"input_ids": words, "labels": words}, policy="calls")
    error = caught.value
    assert error.smallest_bytes is not None
    for part in (
        f"budget {unit.text(20_000)} is below the {unit.text(error.smallest_bytes)} that",
        f"({unit.name} at its peak: ",
        f"Raise budget_gb to {unit.argument(error.smallest_bytes)}, or",
    ):
        assert part in str(error)
    # what it says works
    works: Any = unit.argument(error.smallest_bytes).strip("'")
    works = works if unit.written else float(works)
    actckpt.optimize(model, works, batch={"input_ids": words, "labels": words}, policy="calls")


def arguments(**given: Any) -> Any:
    return types.SimpleNamespace(world_size=1, n_gpu=1, **given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing=False"),
        (
            {"gradient_checkpointing": True, "activation_checkpointing": True},
            "activation_checkpointing=False",
        ),
    ],
    ids=["before transformers 5.23", "since"],
)
def test_a_second_recomputation_is_refused_by_the_name_of_its_version(
    given: dict[str, Any], named: str
) -> None:
    budget = for_transformers.MemoryBudget(None, policy="full")
    with pytest.raises(actckpt.PlanError, match=f"pass {named}"):
        budget.on_train_begin(arguments(**given), None, None, model=nn.Linear(1, 1))


def test_transformers_own_arguments_have_the_name_that_is_advised(tmp_path: Path) -> None:
    budget = for_transformers.MemoryBudget(None, policy="full")
    trainer = make_trainer(tmp_path, budget, max_steps=1, activation_checkpointing=True)
    with pytest.raises(actckpt.PlanError, match="pass activation_checkpointing=False"):
        budget.on_train_begin(trainer.args, None, None, model=nn.Linear(1, 1))
