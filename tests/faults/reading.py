"""Ranks that are killed or stopped while they read together: ``python -m tests.faults.reading``.

Every rank is a forked process over gloo, whose own time-out is far longer than anybody may wait.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor

import actckpt
import actckpt.resuming.together
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.verification import verify_files
from actckpt.sharded import reading_once

WORLD = 3
VICTIM = 1
SILENCE_S, GROUP_S, MOST_S = 4.0, 900.0, 120.0


def play(folder: Path, kind: signal.Signals) -> dict[int, dict[str, Any]]:
    """What the ranks that are left say of a resume in which one of them ends, or stops."""
    pipes = [os.pipe() for _ in range(WORLD)]
    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if not pid:
            try:
                _rank(folder, rank, kind, pipes[rank][1])
            except BaseException as error:
                os.write(pipes[rank][1], json.dumps({"error": repr(error)[:500]}).encode())
            finally:
                os._exit(0)
        pids.append(pid)
    for _, writing in pipes:
        os.close(writing)
    said = {}
    end = time.monotonic() + MOST_S
    for rank in set(range(WORLD)) - {VICTIM}:
        reading = pipes[rank][0]
        if select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
            said[rank] = json.loads(os.read(reading, 1 << 16) or b"{}")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return said


def _rank(folder: Path, rank: int, kind: signal.Signals, pipe: int) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), WORLD),  # type: ignore[attr-defined]
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=GROUP_S),
    )
    for again in (False, True):
        torch.manual_seed(again)
        model = torch.nn.Linear(30, 30)
        run = actckpt.Checkpointer(
            folder / "run",
            model=model,
            every=None,
            on_sigterm=None,
            rank_silence=f"{SILENCE_S}s",
        )
        before = [p.detach().clone() for p in model.parameters()]
        passed = reading_once.passed  # type: ignore[attr-defined]

        def striking(*args: Any, passed: Any = passed) -> None:
            if rank == VICTIM:
                os.kill(os.getpid(), kind)
            passed(*args)

        said: dict[str, Any] = {}
        if again:
            setattr(reading_once, "passed", striking)  # noqa: B010 - a name that it imports
        try:
            run.resume()
        except actckpt.CheckpointError as error:
            said = {"kind": type(error).__name__, "text": str(error)}
        if not again:
            run.save()
            run.close()
    pairs = zip(before, model.parameters(), strict=True)
    said["untouched"] = all(torch.equal(a, b) for a, b in pairs)
    os.write(pipe, json.dumps(said).encode())
    time.sleep(MOST_S)


def main() -> int:
    """Exit status 1 if anybody waited, or restored anything."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    wrong = 0
    for kind in (signal.SIGKILL, signal.SIGSTOP):
        with tempfile.TemporaryDirectory() as name:
            said = play(Path(name), kind)
            for path in Path(name, "run").glob("step-*"):
                verify_files(Files(), str(path))
        sound = len(said) == WORLD - 1 and all(
            s.get("untouched") and s.get("kind") in ("RankSilentError", "CheckpointError")
            for s in said.values()
        )
        wrong += not sound
        print(f"{kind.name} of rank {VICTIM} while it reads: {said}")
    print(f"2 faults, {wrong} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
