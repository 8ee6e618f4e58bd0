"""The run that is disturbed: its objects, its steps, and the directory that a process finds."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actckpt
from actckpt.checkpoint.names import DELETING, SAVING

KEPT = 2
# steps that a sound run has made
LAST = 3
# that a process, the next one, and whoever judges them can come to
LONGEST = LAST + 2 + 2 + 1


def objects(seed: int = 0) -> dict[str, Any]:
    """Arguments of a Checkpointer."""
    torch.manual_seed(seed)
    model = nn.Linear(40, 3)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}


def update(made: dict[str, Any]) -> None:
    """An optimizer step, which depends on nothing but the state and changes all of it."""
    for p in made["model"].parameters():
        p.grad = torch.randn_like(p)
    made["optimizer"].step()
    made["optimizer"].zero_grad()


def advance(run: actckpt.Checkpointer, made: dict[str, Any]) -> None:
    """One step."""
    update(made)
    run.step({"loss": 1.0 / (1 + run.step_count)})


def state(made: dict[str, Any]) -> dict[str, Any]:
    """A copy of the objects' states, and the random state."""
    states = {name: copy.deepcopy(item.state_dict()) for name, item in made.items()}
    return {**states, "random": torch.get_rng_state()}


def saved_state(items: dict[str, Any]) -> dict[str, Any]:
    """The same of the items of a checkpoint."""
    random = items["random"]["torch"]
    return {"model": items["model"], "optimizer": items["optimizer"], "random": random}


@cache
def states() -> tuple[dict[str, Any], ...]:
    """The states after 0, 1, … steps, however often the run was interrupted."""
    with torch.random.fork_rng():
        made = objects()
        run = actckpt.Checkpointer("never written", **made, every=None)
        found = [state(made)]
        for _ in range(LONGEST):
            advance(run, made)
            found.append(state(made))
    return tuple(found)


def prepare(directory: Path) -> None:
    """A run of `LAST` steps, with checkpoints to retire and what killed processes left lying."""
    made = objects()
    with actckpt.Checkpointer(directory, **made, every=None, keep_last=KEPT) as run:
        for step in range(1, LAST + 1):
            advance(run, made)
            run.save()
            if step == 1:
                run.pin(1)
        run.pin(1, False)
    for prefix in (SAVING, DELETING):
        left = directory / f"{prefix}step-00000009-1-a"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half of it")
