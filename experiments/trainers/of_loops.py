"""Cases of Lightning's Trainer and of a loop with accelerate: Trainer's first case, under these."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from experiments.trainers.outcome import Outcome, digest
from tests.trainer_models import Texts, make_lora

with warnings.catch_warnings():  # of the libraries about each other
    warnings.simplefilter("ignore")
    import lightning

EPOCHS, ACCUMULATED = 2, 2
# what a user adds to a script that trains: an import, and the callback
LIGHTNING_LINES = 2
# the same, with a line for what prepares and one for what is iterated
ACCELERATE_LINES = 4
_METERED = 4  # steps of a process up to which peaks are measured


def _loader() -> Any:
    torch.manual_seed(3)
    return DataLoader(Texts(18, 64), 2, shuffle=True, num_workers=2)


def _optimizer(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


class _Steps:
    """Keeps losses and peaks of optimizer steps, and kills the process in the middle of one."""

    def __init__(self, outcome: Outcome, kill_after: int | None) -> None:
        self._outcome = outcome
        self._kill_after = kill_after
        self._made = 0
        self._step: AbstractContextManager[None] | None = None
        self._open = False

    def batch_begins(self, *residents: Any) -> None:
        """A batch of a step does."""
        if not self._open and 0 < self._made < _METERED:  # planning is no part of a step
            self._step = self._outcome.step(*residents)
            self._step.__enter__()
        self._open = True

    def batch_ends(self, step: int, loss: float, *, stepped: bool) -> None:
        """It has.

        Args:
            step: optimizer steps of the whole run that were made, this one included.
        """
        self._outcome.losses[str(step)] = self._outcome.losses.get(str(step), 0.0) + loss
        if stepped:
            self._open = False
            self._made += 1
            metered, self._step = self._step, None
            if metered is not None:
                metered.__exit__(None, None, None)

    def before_step(self, made: int) -> None:
        """An optimizer step comes, after so many."""
        if made == self._kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


class _Lit(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = make_lora(4, 64)

    def training_step(self, batch: Any, _: int) -> Any:
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        return _optimizer(self.net)


class _Watch(lightning.Callback):  # type: ignore[misc]
    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self._before = trainer.global_step
        self._steps.batch_begins(module, *trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self._steps.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, _: Any, outputs: Any, *__: Any) -> None:
        stepped = trainer.global_step != self._before
        self._steps.batch_ends(self._before + 1, outputs["loss"].item(), stepped=stepped)


def with_lightning(folder: Path, budget_gb: float | None, kill_after: int | None) -> Outcome:
    """Lightning's Trainer with LoRA, bf16, accumulation, shuffling and two workers."""
    from actckpt.integrations.lightning import MemoryBudget

    outcome = Outcome()
    model = _Lit()
    callbacks: list[Any] = [_Watch(_Steps(outcome, kill_after))]
    budget = None
    if budget_gb is not None:
        budget = MemoryBudget(budget_gb, checkpoints=folder / "run", every=1, policy="calls")
        callbacks.append(budget)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATED,
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, _loader())
    return _finished(outcome, model, budget)


def with_accelerate(folder: Path, budget_gb: float | None, kill_after: int | None) -> Outcome:
    """A loop of one's own with accelerate, of the same."""
    import accelerate

    from actckpt.integrations.accelerate import MemoryBudget

    outcome = Outcome()
    steps = _Steps(outcome, kill_after)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATED
    )
    model = make_lora(4, 64)
    given = model, _optimizer(model), _loader()
    budget = None
    batches: Iterable[Any]
    if budget_gb is None:
        model, optimizer, loader = accelerator.prepare(*given)
        batches = (batch for _ in range(EPOCHS) for batch in loader)
    else:
        budget = MemoryBudget(
            accelerator, budget_gb, checkpoints=folder / "run", every=1, policy="calls"
        )
        model, optimizer, _, _ = budget.prepare(*given)
        batches = (batch for _, batch in budget.steps(epochs=EPOCHS))
    made = 0 if budget is None or budget.resumed is None else budget.resumed.step
    for batch in batches:
        with accelerator.accumulate(model):
            steps.batch_begins(model, optimizer.optimizer)
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                steps.before_step(made)
            optimizer.step()
            optimizer.zero_grad()
        steps.batch_ends(made + 1, loss.item(), stepped=accelerator.sync_gradients)
        made += accelerator.sync_gradients
    return _finished(outcome, model, budget)


def _finished(outcome: Outcome, model: Any, budget: Any) -> Outcome:
    outcome.weights = digest(model)
    if budget is not None and budget.resumed is not None:
        outcome.resumed, outcome.inexact = budget.resumed.step, budget.resumed.inexact
    return outcome
