"""A run of two ranks, step by step, for scenarios in which one of them does something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import actckpt

# of what is not to be waited for; a rank that waits for it is found by its time
PATIENT, SHORT = "40s", "6s"


def begun(at: Path, timeout: str = PATIENT, **options: Any) -> Any:
    """A run of a tiny model, resumed."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"every": 1, "on_sigterm": None, "keep_last": None, **options}
    run = actckpt.Checkpointer(
        at, model=model, optimizer=optimizer, rank_timeout=timeout, **options
    )
    run.resume()
    return run


def step(run: Any, **metrics: float) -> None:
    """One of both ranks, and what it began."""
    run.step(metrics=metrics)
    run._saver.wait()
    dist.barrier()


def verdict(run: Any) -> list[Any]:
    """Of the save that ended last."""
    last = run.last_save
    return [last.step, last.verdict]


def steps(at: Path) -> list[int]:
    """What there is of the run."""
    return sorted(int(p.name[5:13]) for p in at.glob("step-*"))


@contextmanager
def failing(here: bool, target: Any, name: str, error: Exception) -> Iterator[None]:
    """On this rank a function fails."""
    if not here:
        yield
        return
    with mock.patch.object(target, name, side_effect=error):
        yield
