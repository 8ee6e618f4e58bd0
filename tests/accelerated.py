"""A small training with accelerate, in this process or one that is killed.

``python -m tests.accelerated FOLDER THREADS`` trains with LoRA, bf16, accumulation, shuffling and
two workers under a tight budget, and kills itself in the middle of the second epoch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.state
import torch
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from actckpt.integrations.accelerate import MemoryBudget
from tests import trainer_models
from tests.trainer_models import ADAPTED, Rows, next_row_loss, with_adapters

SAMPLES = 20
KILLED_AT = 16
BUDGET_BYTES = 950_000


class Blocks(trainer_models.Blocks):
    """Whose output is the loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next_row_loss(super().forward(x), x)


def objects(seed: int = 3, workers: int = 0, **configuration: Any) -> tuple[Any, ...]:
    """An accelerator, a model with adapters, its optimizer, a shuffled loader, a schedule.

    Args:
        seed: of all that is drawn once they are made.
        configuration: of the loader that accelerate makes.
    """
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    torch.manual_seed(7)
    accelerator = accelerate.Accelerator(
        cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(**configuration),
    )
    model = with_adapters(Blocks(), ADAPTED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    torch.manual_seed(seed)
    loader = DataLoader(Rows(SAMPLES, 96), 2, True, num_workers=workers)
    return accelerator, model, optimizer, loader, schedule


def train(
    accelerator: Any,
    model: Any,
    optimizer: Any,
    schedule: Any,
    batches: Iterable[Any],
    after: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """The losses.

    Args:
        after: called after each batch with their number.
    """
    losses: list[float] = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        after(len(losses))
    return losses


def untouched(**configuration: Any) -> tuple[list[float], Any]:
    """Losses and model of three epochs without a plan."""
    accelerator, *rest = objects(**configuration)
    model, optimizer, loader, schedule = accelerator.prepare(*rest)
    batches = (batch for _ in range(3) for batch in loader)
    return train(accelerator, model, optimizer, schedule, batches), model


def budgeted(
    folder: Path | None, after: Callable[[int], None] = lambda _: None, **configuration: Any
) -> tuple[list[float], Any, MemoryBudget]:
    """The same under a tight budget, resumed where there is something to resume."""
    accelerator, *rest = objects(**configuration)
    budget = MemoryBudget(
        accelerator, BUDGET_BYTES / 1e9, checkpoints=folder, every=1, policy="calls"
    )
    model, optimizer, _, schedule = budget.prepare(*rest)
    batches = (batch for _, batch in budget.steps(epochs=3))
    return train(accelerator, model, optimizer, schedule, batches, after), model, budget


def main(folder: Path, threads: int) -> None:
    """Trains until it kills itself."""
    torch.set_num_threads(threads)

    def kill(batches: int) -> None:
        if batches == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    budgeted(folder, kill, workers=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
