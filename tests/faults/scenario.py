"""The run that is disturbed: its objects, its steps, and the directory that a process finds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actckpt
from actckpt.checkpoint.names import DELETING, FROZEN, SAVING

KEPT = 2
# steps that a sound run has made
LAST = 3
# that a process, the next one, and whoever judges them can come to
LONGEST = LAST + 2 + 2 + 1


@dataclass(frozen=True, slots=True)
class Before:
    """What a process finds: steps of the checkpoints, and whether most of the model is frozen."""

    steps: tuple[int, ...] = ()
    frozen: bool = False


def objects(seed: int = 0, *, frozen: bool = False) -> dict[str, Any]:
    """Arguments of a Checkpointer."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Linear(40, 3)
    trained = [*model.parameters()]
    if frozen:
        model = nn.Sequential(nn.Linear(40, 40).requires_grad_(False), model)
    return {"model": model, "optimizer": torch.optim.AdamW(trained, lr=0.01)}


def update(made: dict[str, Any]) -> None:
    """An optimizer step, which depends on nothing but the state and changes all of it; what is
    frozen is changed by hand with every third.
    """
    optimizer = made["optimizer"]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    if int(optimizer.state[p]["step"]) % LAST == 0:
        for p in made["model"].parameters():
            if not p.requires_grad:
                p.data += 1  # behind the back of whoever counts versions


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
def states(frozen: bool) -> tuple[dict[str, Any], ...]:
    """The states after 0, 1, … steps, however often the run was interrupted."""
    with torch.random.fork_rng():
        made = objects(frozen=frozen)
        run = actckpt.Checkpointer("never written", **made, every=None)
        found = [state(made)]
        for _ in range(LONGEST):
            advance(run, made)
            found.append(state(made))
    return tuple(found)


def prepare(directory: Path, *, frozen: bool = False) -> None:
    """A run of `LAST` steps, with checkpoints to retire and what killed processes left lying."""
    made = objects(frozen=frozen)
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
    if frozen:
        for name in (f"{SAVING}base-1-a", f"{'0' * 32}.safetensors"):
            (directory / FROZEN / name).write_bytes(b"half of it")
