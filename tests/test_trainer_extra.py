"""What a user gives to `MemoryBudget` beside a trainer's own: kept, put back, and no reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import actckpt

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from transformers import Trainer

from actckpt.integrations.transformers import MemoryBudget
from tests.trained import Stops, history, make_trainer
from tests.trainer_runs import QUIET, Stopped, bits, is_same, stop

pytestmark = QUIET
STEPS, STOPPED_AFTER = 4, 2


class Distills(Trainer):  # type: ignore[misc]
    """Whose loss keeps near to a teacher that follows the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = model(**inputs)["loss"]
        with torch.no_grad():
            for mine, its in zip(self.teacher.parameters(), model.parameters(), strict=True):
                mine.lerp_(its, 0.2)
            target = self.teacher(**inputs)["loss"]
        return loss + 0.5 * (loss - target).square()


def distilling(folder: Path) -> Any:
    return make_trainer(folder, kind=Distills, max_steps=STEPS)


def test_a_teacher_that_is_given_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = distilling(tmp_path / "whole")
    whole.train()

    def resumed(given: bool) -> tuple[Any, MemoryBudget]:
        folder = tmp_path / str(given)
        for after in (STOPPED_AFTER, None):
            trainer = distilling(folder)
            extra = {"teacher": trainer.teacher} if given else None
            budget = MemoryBudget(None, checkpoints=folder / "run", every=1, extra=extra)
            trainer.add_callback(budget)
            if after is None:
                trainer.train()
                return trainer, budget
            trainer.add_callback(Stops(after, stop))
            with pytest.raises(Stopped):
                trainer.train()
        raise AssertionError

    trainer, budget = resumed(given=True)
    assert budget.resumed is not None
    assert (budget.resumed.step, budget.resumed.inexact) == (STOPPED_AFTER, ())
    assert is_same(bits(whole.model), bits(trainer.model))
    assert is_same(bits(whole.teacher), bits(trainer.teacher))
    assert history(trainer) == history(whole)
    # else it is said, and what works is named
    other, budget = resumed(given=False)
    assert budget.resumed is not None
    (why,) = budget.resumed.inexact
    assert why.startswith("Distills.teacher's weights change as it trains, and are not kept: give")
    assert not is_same(bits(whole.teacher), bits(other.teacher))


def test_a_name_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    trainer = distilling(tmp_path)
    extra = {"trainer": trainer.teacher}
    trainer.add_callback(MemoryBudget(None, checkpoints=tmp_path / "run", extra=extra))
    with pytest.raises(actckpt.ArgumentError, match=r"extra=\{'trainer': ...\}: what the tr"):
        trainer.train()
