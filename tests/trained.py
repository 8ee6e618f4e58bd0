"""A small training under transformers' Trainer, in this process or one that is killed.

``python -m tests.trained FOLDER THREADS`` trains with LoRA, bf16, accumulation, shuffling and
two workers under a tight budget, and kills itself in the middle of the second epoch.
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

from tests.trainer_models import Texts, make_lora

with warnings.catch_warnings():  # of the libraries about each other
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from actckpt.integrations.transformers import MemoryBudget

KILLED_AT = 6
# what no two runs log alike
TIMES = ("runtime", "per_second")
BAR: dict[str, Any] = {"bf16": True, "dataloader_num_workers": 2}


class Small(nn.Module):
    """Two blocks that draw dropout masks, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
            for _ in range(2)
        )
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(input_ids)
        for block in self.blocks:
            x = x + block(x)
        x = self.head(x)
        return {"loss": nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())}


def make_small() -> nn.Module:
    """It, with the same weights every time."""
    torch.manual_seed(7)
    return Small()


def make_adapted() -> Any:
    """What is trained at the bar."""
    return make_lora(attn_implementation="eager")


class Stops(TrainerCallback):  # type: ignore[misc]
    """Stops a training once, in the middle of the batches of the step after so many."""

    def __init__(self, after: int, stop: Callable[[], None]) -> None:
        self._after: int | None = after
        self._stop = stop

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._after:
            self._after = None
            self._stop()


def history(trainer: Any) -> list[dict[str, float]]:
    """What was logged, but for times."""
    return [
        {name: x for name, x in line.items() if not any(part in name for part in TIMES)}
        for line in trainer.state.log_history
    ]


def make_trainer(
    folder: Path,
    *callbacks: Any,
    model: Any = None,
    data: Any = None,
    kind: type[Trainer] = Trainer,
    **settings: Any,
) -> Any:
    """Three epochs of batches of two, two batches a step, every step logged."""
    given: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return kind(
        model=make_small() if model is None else model,
        args=TrainingArguments(str(folder / "out"), **{**given, **settings}),
        train_dataset=Texts() if data is None else data,
        eval_dataset=Texts(),
        callbacks=[*callbacks],
    )


def tight(folder: Path) -> MemoryBudget:
    """The callback of the run that is killed; untouched the model takes 0.000287 GB."""
    return MemoryBudget(
        0.0002, checkpoints=folder / "run", every=1, scope="activations", policy="calls"
    )


def main(folder: Path, threads: int) -> None:
    """Trains until it kills itself."""
    torch.set_num_threads(threads)
    kills = Stops(KILLED_AT, lambda: os.kill(os.getpid(), signal.SIGKILL))
    make_trainer(folder, kills, tight(folder), model=make_adapted(), **BAR).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
