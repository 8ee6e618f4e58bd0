"""What is disturbed: one process that takes a run up, trains a step, saves, and retires."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import DELETING, SAVING

KEPT = 2
# steps that a sound run has made
LAST = 3


@dataclass(slots=True)
class Acted:
    """What a process said before it ended.

    Args:
        resumed: step it went on from, 0 for a new run; None if it did not get so far.
        claimed: step of the checkpoint that it said it has made.
        error: what it said instead.
    """

    resumed: int | None = None
    claimed: int | None = None
    error: Exception | None = None

    def say(self, word: str, what: Any) -> None:
        """Takes down one of these."""
        setattr(self, word, what)


Say = Callable[[str, Any], None]


def objects(seed: int = 0) -> dict[str, Any]:
    """Arguments of a Checkpointer."""
    torch.manual_seed(seed)
    model = nn.Linear(40, 3)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}


def advance(run: actckpt.Checkpointer, made: dict[str, Any]) -> None:
    """One step, which depends on nothing but the state."""
    for p in made["model"].parameters():
        p.grad = torch.randn_like(p)
    made["optimizer"].step()
    made["optimizer"].zero_grad()
    run.step({"loss": 1.0 / (1 + run.step_count)})


def state(made: dict[str, Any]) -> dict[str, Any]:
    """A copy of the objects' states."""
    return {name: copy.deepcopy(item.state_dict()) for name, item in made.items()}


@cache
def states() -> tuple[dict[str, Any], ...]:
    """The states after 0, 1, … steps, however often the run was interrupted."""
    with torch.random.fork_rng():
        made = objects()
        run = actckpt.Checkpointer("never written", **made)
        found = [state(made)]
        for _ in range(6):
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


def act(directory: Path, files: Files, say: Say, *, in_thread: bool = False) -> None:
    """The process: resumes, makes a step, saves; and says so at once."""
    made = objects()
    run = actckpt.Checkpointer(directory, **made, every=None, keep_last=KEPT, files=files)
    try:
        resumed = run.resume()
        say("resumed", 0 if resumed is None else resumed.step)
        advance(run, made)
        say("claimed", (_elsewhere(run.save) if in_thread else run.save()).step)
        run.close()
    except (actckpt.CheckpointError, OSError) as error:
        say("error", error)
    finally:
        run.close()


def _elsewhere(work: Callable[[], Any]) -> Any:
    """The result of ``work`` in another thread."""
    result: list[Any] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return result[0]
