"""A run of a few kilobytes with a journal, ended wherever a test likes and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import actckpt
from actckpt.resuming.journal_compare import Verified
from actckpt.resuming.resumed import Resumed

EVERY = 5
SAMPLES, BATCH = 64, 8


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 1))


@dataclass(slots=True)
class Ended:
    """What a process left: losses by step, what it resumed, and what it had verified."""

    losses: dict[int, float]
    resumed: Resumed | None
    verified: Verified


def no_change(run: Training) -> None:
    pass


@dataclass(slots=True)
class Training:
    """A process's loop; a plant may change anything of it, at any step.

    Args:
        step: the one that is being made.
    """

    checkpointer: actckpt.Checkpointer
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    step: int = 0
    batch: Any = None
    loss: float = 0.0

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self.model(self.batch[0]).square().mean()
        return loss

    def train_on(self, batch: Any) -> None:
        """Adds to the gradients."""
        self.batch = batch
        self.forward().backward()

    def update(self) -> None:
        """Steps."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def process(
    directory: Path,
    until: int,
    *,
    before: Callable[[Training], None] = no_change,
    forward: Callable[[Training], torch.Tensor] = Training.forward,
    after: Callable[[Training], None] = no_change,
    data: Callable[[torch.Tensor], None] = lambda data: None,
    **how: Any,
) -> Ended:
    """Trains until so many steps are made, and ends as a killed process does: without a save.

    Args:
        before: a batch is trained on.
        after: the optimizer's step, before it is counted.
        data: changes what is read.
    """
    with training(directory, data, **how) as run:
        checkpointer = run.checkpointer
        resumed = checkpointer.resume()
        losses = {}
        for step, batch in checkpointer.steps(epochs=None, total_steps=until):
            run.step, run.batch = step + 1, batch
            before(run)
            loss = forward(run)
            loss.backward()
            run.update()
            run.loss = losses[run.step] = loss.item()
            after(run)
            checkpointer.step({"loss": run.loss})
        return Ended(losses, resumed, checkpointer.verified)


@contextmanager
def training(
    directory: Path, change: Callable[[torch.Tensor], None] = lambda data: None, **how: Any
) -> Iterator[Training]:
    """The objects of a process, closed at the end."""
    data = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(1))
    change(data)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = {"every": EVERY, "background": False, **how}
    with actckpt.Checkpointer(
        directory,
        model=model,
        optimizer=optimizer,
        loader=DataLoader(TensorDataset(data), batch_size=BATCH, shuffle=True),
        **settings,
    ) as checkpointer:
        yield Training(checkpointer, model, optimizer)
