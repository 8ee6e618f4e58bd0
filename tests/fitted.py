"""A small training under Lightning's Trainer, in this process or one that is killed.

``python -m tests.fitted FOLDER THREADS`` trains with LoRA, bf16, accumulation, shuffling and two
workers under a tight budget, and kills itself in the middle of the second epoch.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from actckpt.profiler.meter import AllocatorMeter
from tests.loop_peaks import resident_bytes
from tests.trainer_models import ADAPTED, Blocks, Rows, next_row_loss, with_adapters

with warnings.catch_warnings():  # of the libraries about each other
    warnings.simplefilter("ignore")
    import lightning

    from actckpt.integrations.lightning import MemoryBudget

KILLED_AT = 17
MEASURED = 6
BAR: dict[str, Any] = {"precision": "bf16-mixed"}
BUDGET_BYTES = 950_000


class Lit(lightning.LightningModule):  # type: ignore[misc]
    """Blocks that draw dropout masks; keeps what happened, in order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = self.make_net()
        self.history: list[tuple[Any, ...]] = []

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 8))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = next_row_loss(self.net(batch), batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val_loss", next_row_loss(self.net(batch), batch))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_end(self, outputs: Any, _: Any, index: int) -> None:
        at = self.current_epoch, index, self.global_step
        self.history.append((*at, outputs["loss"].item(), self.optimizers().param_groups[0]["lr"]))

    def on_train_epoch_start(self) -> None:
        self.history.append(("begins", self.current_epoch))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.history.append(("validated", self.trainer.callback_metrics["val_loss"].item()))

    def on_train_epoch_end(self) -> None:
        self.history.append(("ends", self.trainer.callback_metrics["loss_epoch"].item()))


class Adapted(Lit):
    """Of which adapters are trained."""

    def make_net(self) -> nn.Module:
        return with_adapters(Blocks(), ADAPTED)  # type: ignore[no-any-return]


class Stops(lightning.Callback):  # type: ignore[misc]
    """Does something after so many batches."""

    def __init__(self, after: int, stop: Callable[[Any], None]) -> None:
        self._left = after
        self._stop = stop

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._left -= 1
        if not self._left:
            self._stop(trainer)


class Peaks(lightning.Callback):  # type: ignore[misc]
    """The highest bytes that a batch's step has allocated, residents included; of the first few."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self._meter: AllocatorMeter | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
        if len(self.peaks) == MEASURED:
            return
        self._before = resident_bytes(module, *trainer.optimizers, batch)
        self._meter = AllocatorMeter("cpu", residents=False)
        self._meter.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.__exit__(None, None, None)
            self.peaks.append(self._before + meter.peak_bytes)


def fit(model: Any, *callbacks: Any, loader: Any = None, **settings: Any) -> Any:
    """Three epochs of batches of two, two batches a step; returns the trainer.

    Args:
        loader: by default shuffled.
    """
    given: dict[str, Any] = {
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        "limit_val_batches": 2,
    }
    trainer = lightning.Trainer(callbacks=[*callbacks], **{**given, **settings})
    loader = DataLoader(Rows(), 2, shuffle=True) if loader is None else loader
    trainer.fit(model, loader, DataLoader(Rows(), 2))
    return trainer


def fit_the_bar(folder: Path | None, *callbacks: Any) -> tuple[Any, Any]:
    """The module and its budget; without a folder, untouched."""
    model = Adapted()
    budget = None
    if folder is not None:
        budget = MemoryBudget(BUDGET_BYTES / 1e9, checkpoints=folder, every=1, policy="calls")
    loader = DataLoader(Rows(rows=96), 2, shuffle=True, num_workers=2)
    fit(model, *callbacks, *([] if budget is None else [budget]), loader=loader, **BAR)
    return model, budget


def main(folder: Path, threads: int) -> None:
    """Trains until it kills itself."""
    torch.set_num_threads(threads)

    def kill(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    fit_the_bar(folder, Stops(KILLED_AT, kill))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
