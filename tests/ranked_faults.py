"""What two ranks do of which one fails, or does what the other does not.

``python -m tests.ranked_faults FOLDER SCENARIO RANK`` is one of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import actckpt
from actckpt.errors import CheckpointError, CheckpointSaveError
from actckpt.resuming import choosing_together
from actckpt.resuming.shared_directory import SharedDirectory
from actckpt.resuming.staging import Staging, StagingSet
from actckpt.sharded import committing, exchange, share_writing, waiting
from actckpt.sharded.exchange import Exchange
from tests.ranked import group
from tests.ranked_mistakes import disks, folders, in_other_calls, stopped
from tests.ranked_steps import SHORT, begun, failing, step, steps, verdict


def saves_apart(folder: Path, rank: int) -> dict[str, Any]:
    """One rank saves once more, or finds that a save is due where the other does not."""
    found: dict[str, Any] = {}
    run = begun(folder / "lone", SHORT, every=2)
    step(run)
    step(run)
    if not rank:
        try:
            run.save()
        except CheckpointSaveError as error:
            found["alone"] = str(error)
    dist.barrier()
    found["lone"] = []
    for _ in range(4):
        step(run)
        found["lone"].append(verdict(run))
    run.close()
    run = begun(folder / "better", only_better=("loss", "min"))
    for loss in (3.0, 2.0, 5.0, 1.0):
        step(run, loss=loss if not rank else 4.0 - loss)
    found["better"] = verdict(run)
    run.close()
    run = begun(folder / "function", every=lambda step: step == (3 if rank else 2))
    for _ in range(4):
        step(run)
    found["function"] = verdict(run)
    run.close()
    dist.barrier()
    for name in ("lone", "better", "function"):
        found[f"{name} steps"] = steps(folder / name)
    return found


def one_fails(folder: Path, rank: int) -> dict[str, Any]:
    """Something fails on one rank, in a save: all say the same of it, at once, and go on."""
    found: dict[str, Any] = {}

    def scene(name: str, on: int, target: Any, what: str, error: Exception) -> None:
        run = begun(folder / name)
        step(run)
        begin = time.monotonic()
        with failing(rank == on, target, what, error):
            step(run)
        late = time.monotonic() - begin > 30
        here = [verdict(run), late]
        step(run)
        found[name] = [*here, verdict(run)]
        run.close()
        dist.barrier()
        found[name].append(steps(folder / name))

    def memory() -> Exception:
        return RuntimeError("no memory")

    scene("copy", 1, StagingSet, "await_copies", memory())
    scene("copy of the first", 0, StagingSet, "await_copies", memory())
    scene("staging", 1, Staging, "copy", CheckpointSaveError("no memory"))
    scene("staging of the first", 0, Staging, "copy", CheckpointSaveError("no memory"))
    scene("listing", 1, SharedDirectory, "find", CheckpointError("cannot be listed"))
    scene("share", 1, committing, "write_share", memory())
    scene("share of the first", 0, committing, "write_share", memory())
    scene("read back", 0, committing, "checked", CheckpointError("cannot be read now"))
    return found


def told_late(folder: Path, rank: int) -> dict[str, Any]:
    """A verdict that cannot be told, and one that is heard late."""
    found: dict[str, Any] = {}
    run = begun(folder / "untold", SHORT)
    tell = Exchange.tell

    def mute(self: Exchange, key: str, message: Any) -> None:
        if not rank and key.endswith("/verdict"):
            raise CheckpointError("the store does not answer")
        tell(self, key, message)

    with mock.patch.object(Exchange, "tell", mute):
        step(run)
    found["untold"] = verdict(run)
    run.close()
    made: list[int] = []
    run = begun(folder / "late", on_saved=lambda checkpoint: made.append(checkpoint.step))
    write_share = share_writing.write_share

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.6)
        return write_share(*args, **kwargs)

    begin = time.monotonic()
    with (
        mock.patch.object(committing, "write_share", slow if not rank else write_share),
        mock.patch.object(waiting, "_MOST_S", 1.0 if rank else 0.05),
    ):
        run.step()
        with failing(rank == 1, run._saves, "snapshot", CheckpointSaveError("a lambda")):
            run.step()
        run._saver.wait()
    found["late"] = [verdict(run), time.monotonic() - begin > 30]
    run.close()
    found["made"] = made
    dist.barrier()
    found["steps"] = steps(folder / "untold") + steps(folder / "late")
    return found


def unreadable(folder: Path, rank: int) -> dict[str, Any]:
    """One rank cannot read what there is, once."""
    found: dict[str, Any] = {}
    run = begun(folder / "run")
    step(run)
    step(run)
    run.close()
    run = actckpt.Checkpointer(folder / "run", model=nn.Linear(3, 3), every=None)
    with failing(rank == 1, choosing_together, "read_manifest", CheckpointError("timed out")):
        try:
            run.resume()
        except CheckpointError as error:
            found["error"] = [type(error).__name__, str(error)]
    run.close()
    # a process group of accelerators alone carries nothing: each reads for itself, and says so
    with (
        mock.patch.object(choosing_together, "can_pass", return_value=False),
        mock.patch.object(choosing_together.logger, "info") as said,
    ):
        run = begun(folder / "run")
    found["then"] = run.step_count
    found["said"] = "every rank reads for itself" in str(said.call_args_list)
    run.close()
    return found


def asked_to_end(folder: Path, rank: int) -> dict[str, Any]:
    """SIGTERM comes to one rank, and the handler that was there before lets the run go on."""
    passed: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: passed.append(run.step_count))
    run = begun(folder / "run", every=None, on_sigterm="save")
    for number in range(1, 11):
        if number in (2, 7) and rank:
            os.kill(os.getpid(), signal.SIGTERM)
        dist.barrier()
        run.step()
    run.close()
    dist.barrier()
    return {"passed": passed, "steps": steps(folder / "run")}


class Kept:
    """Plain data of a rank."""

    def __init__(self, **data: Any) -> None:
        self.data: dict[str, Any] = data

    def state_dict(self) -> dict[str, Any]:
        return dict(self.data)

    def load_state_dict(self, data: dict[str, Any]) -> None:
        self.data = dict(data)


def started_again(folder: Path, rank: int) -> dict[str, Any]:
    """Ranks that come to the store of a run before them, in which all that was said still is."""
    run = begun(folder / "run")
    step(run)
    step(run)
    run.close()
    dist.barrier()
    found: dict[str, Any] = {}
    # whoever is first finds what the other said before
    for late in (0, 1):
        # as processes do that have made none yet: torchrun starts them on the store it has
        exchange._NUMBERS.clear()
        if rank == late:
            time.sleep(0.3)
        run = begun(folder / "run")
        found[f"at {late}"] = run.step_count
        step(run)
        found[f"saved {late}"] = verdict(run)
        run.close()
        dist.barrier()
    return found


def own_items(folder: Path, rank: int) -> dict[str, Any]:
    """Plain data that ranks have otherwise, and what one of them has alone."""
    first = {"both": Kept(a=1, seen={"x": 1}), "alone": Kept(first=True)}
    second = {"both": Kept(seen={"y": 2}), "mine": Kept(second=True)}

    def here(fill: bool) -> dict[str, Kept]:
        given = first if not rank else second
        return given if fill else {name: Kept() for name in given}

    run = begun(folder / "run", extra=here(True))
    step(run)
    run.close()
    again = here(False)
    run = begun(folder / "run", extra=again)
    found = {
        "step": run.step_count,
        "data": {name: kept.data for name, kept in again.items()},
    }
    run.close()
    return found


def without_others(folder: Path) -> dict[str, Any]:
    """What `own_items` has left, in a process on its own."""
    given = {name: Kept() for name in ("both", "alone")}
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = actckpt.Checkpointer(
        folder / "own_items" / "run", model=model, optimizer=optimizer, extra=given, every=None
    )
    resumed = run.resume()
    assert resumed is not None
    run.close()
    return {
        "inexact": list(resumed.inexact),
        "data": {name: kept.data for name, kept in given.items()},
    }


SCENARIOS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        saves_apart,
        one_fails,
        told_late,
        unreadable,
        asked_to_end,
        own_items,
        started_again,
        disks,
        stopped,
        in_other_calls,
        folders,
    )
}


def main(folder: Path, names: str, rank: int) -> None:
    """Runs some scenarios, or ``all``, and writes what came of them."""
    torch.set_num_threads(1)
    found = {}
    with group(folder, "all", rank, 2):
        for name in SCENARIOS if names == "all" else names.split(","):
            (folder / name).mkdir(exist_ok=True)
            found[name] = SCENARIOS[name](folder / name, rank)
            dist.barrier()
    if not rank and "own_items" in found:
        found["without_others"] = without_others(folder)
    (folder / f"{names}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
