"""Processor time until the second optimizer step, beside an earlier tree: what planning takes.

Every training is a process of its own, the trees take turns, and the costs of operations are
measured beforehand, by a first run of each that does not count.

    git worktree add ../before 573e56b
    python -m experiments.planning_time ../before [CASE ...] [--rounds N] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.arguments import among
from experiments.progress import progress
from experiments.results import FOLDER, circumstances, markdown_table, write_markdown

HERE = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "planned_training.py"
# name -> what it is, training, arm of the untouched model, arm before, arm now
CASES = {
    "trainer": ("LoRA, Trainer, accumulation", "lora", "untouched", "optimize", "optimize"),
    "callback": ("the same, MemoryBudget now", "lora", "untouched", "optimize", "MemoryBudget"),
    "accumulation": (
        "demo's model, planned in the first forward, accumulation", "demo",
        "untouched accumulate", "optimize accumulate", "optimize accumulate",
    ),
    "lazy": ("demo's model, planned in the first forward", "demo", "untouched", "optimize",
             "optimize"),
    "given": ("demo's model, batch, loss and optimizer given", "demo", "untouched", "given",
              "given"),
}  # fmt: skip
BEFORE, NOW = "before", "now"

Run = dict[str, Any]
Asked = tuple[str, str, str]  # tree, training, arm


def run(asked: Asked, trees: dict[str, Path], cache: str) -> Run:
    """What one process found."""
    tree, training, arm = asked
    environment = os.environ | {
        "PYTHONPATH": str(trees[tree]), "ACTCKPT_CACHE": cache, "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), training, arm],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, runs: dict[Asked, list[Run]]) -> list[str]:
    """A line of the table."""
    what, training, untouched, before, now = CASES[name]

    def seconds(tree: str, arm: str) -> float:
        return float(statistics.median(r["cpu_s"] for r in runs[tree, training, arm]))

    plain, old, new = seconds(NOW, untouched), seconds(BEFORE, before), seconds(NOW, now)
    overheads = [
        max(r["overhead"] for r in runs[tree, training, arm])
        for tree, arm in ((BEFORE, before), (NOW, now))
    ]
    return [
        what,
        f"{plain:.2f} s",
        f"{old:.2f} s",
        f"{new:.2f} s",
        f"{new / old:.2f}",
        f"{(new - plain) / (old - plain):.2f}",
        *(f"{100 * o:+.2f} %" for o in overheads),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.planning_time",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("tree", type=Path, help="the earlier tree")
    parser.add_argument("cases", nargs="*", type=among("case", CASES), metavar="CASE")
    parser.add_argument("--cache", help="folder of costs that are measured already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of planning_time.md")
    options = parser.parse_args()
    if not (options.tree / "actckpt" / "api.py").exists():
        parser.error(f"not a tree of actckpt: {options.tree}")
    trees = {BEFORE: options.tree.resolve(), NOW: HERE}
    asked: dict[Asked, None] = {}
    names = options.cases or list(CASES)
    for _, training, untouched, before, now in map(CASES.__getitem__, names):
        for tree, arm in ((NOW, untouched), (BEFORE, before), (NOW, now)):
            asked[tree, training, arm] = None
    runs: dict[Asked, list[Run]] = {a: [] for a in asked}
    # each has operations of its own: gradients that are added up, or what one tree alone measures
    first = [] if options.cache else [a for a in asked if not a[2].startswith("untouched")]
    total = len(asked) * options.rounds + len(first)
    with tempfile.TemporaryDirectory() as folder, progress(total, "planning time") as done:
        cache = options.cache or folder
        for one in first:
            run(one, trees, cache)
            done(f"{' '.join(one)}: operations measured")
        for _ in range(options.rounds):
            for one in asked:
                runs[one].append(run(one, trees, cache))
                done(f"{' '.join(one)}: {runs[one][-1]['cpu_s']:.2f} s")
    commits = {
        name: subprocess.run(
            ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False,
        ).stdout.strip()
        for name, tree in trees.items()
    }  # fmt: skip
    about = circumstances(
        {"torch": torch.__version__},
        **commits,
        rounds=options.rounds,
        time="processor seconds of the process from the call of optimize (or the beginning of "
        "training) to the end of the second optimizer step, one thread, medians",
    )
    columns = [
        "", "untouched", BEFORE, NOW, "now / before", "planning alone, now / before",
        "overhead before", "overhead now",
    ]  # fmt: skip
    table = markdown_table(columns, [row(name, runs) for name in names])
    write_markdown("planning_time", about, "# Planning time", table, folder=options.out)
    print(table)


if __name__ == "__main__":
    main()
