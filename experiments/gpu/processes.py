"""Every model in a process of its own, which ends when its time is over, whatever it is doing."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.gpu.cases import add_row, read_rows, run
from experiments.gpu.subjects import MODELS, QUICK
from experiments.gpu.table import set_aside, write

ROUNDS = 8


def prepare(folder: Path, quick: bool) -> Path:
    """The empty file of rows in a folder without results of other hardware."""
    folder.mkdir(parents=True, exist_ok=True)
    if quick:
        os.environ[QUICK] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    if torch.cuda.is_available():
        set_aside(folder, torch.cuda.get_device_name())
    path = folder / "gpu_rows.jsonl"
    path.unlink(missing_ok=True)
    return path


def run_models(
    names: Sequence[str],
    path: Path,
    rounds: int,
    *,
    until: float,
    end: float,
    done: Callable[[str], None],
    tests: str = "",
) -> None:
    """Adds the rows of the models to ``path``, and writes the results after each.

    Args:
        until: time after which no further budget of a model is planned; shared among them.
        end: time at which whatever still runs is killed; what it had found stays.
        done: told of each model that has ended.
        tests: what the CUDA tests came to, for the results.
    """
    context = multiprocessing.get_context("spawn")
    for i, name in enumerate(names):
        left_s = end - time.time()
        if left_s <= 0:
            add_row(path, {"model": name, "case": "process", "failed": "no time was left for it"})
            done(f"{name}: no time left")
            continue
        mine = time.time() + max(0.0, until - time.time()) / (len(names) - i)
        process = context.Process(target=run, args=(name, path, rounds, mine))
        process.start()
        # twice its share: one that hangs must leave time to the others
        process.join(min(left_s, 2 * left_s / (len(names) - i)))
        if process.is_alive():
            process.kill()
            process.join()
            add_row(path, {"model": name, "case": "process", "failed": "killed: its time was over"})
        elif process.exitcode:
            died = f"the process ended with status {process.exitcode}"
            add_row(path, {"model": name, "case": "process", "failed": died})
        write(path.parent, read_rows(path), {n: what for n, (what, _, _) in MODELS.items()}, tests)
        done(name)
