"""Two processes that train together under the three MemoryBudgets, and are refused.

``torchrun --nproc-per-node 2 -m tests.ranks FOLDER`` writes what each was told into a file of its
own; ``--standalone`` finds a free port.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import actckpt

warnings.simplefilter("ignore")  # of the libraries about each other


def with_accelerate(folder: Path) -> None:
    """A loop of one's own."""
    import accelerate

    from actckpt.integrations.accelerate import MemoryBudget

    MemoryBudget(accelerate.Accelerator(cpu=True), "8GB", checkpoints=folder / "accelerate")


def with_trainer(folder: Path) -> None:
    """transformers' Trainer, whose processes are those of accelerate."""
    from actckpt.integrations.transformers import MemoryBudget
    from tests.trained import make_trainer

    make_trainer(folder, MemoryBudget("8GB", checkpoints=folder / "trainer")).train()


def with_lightning(folder: Path) -> None:
    """Lightning's Trainer."""
    from actckpt.integrations.lightning import MemoryBudget
    from tests.fitted import Lit, fit

    budget = MemoryBudget("8GB", checkpoints=folder / "lightning")
    fit(Lit(), budget, devices=2, strategy="ddp")


def by_hand(_: Path) -> None:
    """A model that DistributedDataParallel wraps."""
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    actckpt.optimize(wrapped, "8GB")


TRAINERS: dict[str, Callable[[Path], None]] = {
    "accelerate": with_accelerate,
    "transformers": with_trainer,
    "lightning": with_lightning,
    "by hand": by_hand,
}


def told(train: Callable[[Path], None], folder: Path) -> Any:
    """What is raised, as its kind and text."""
    try:
        train(folder)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def main(folder: Path) -> None:
    """Has every trainer refuse, in the same order in every process."""
    torch.set_num_threads(1)
    found = {name: told(train, folder) for name, train in TRAINERS.items()}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
