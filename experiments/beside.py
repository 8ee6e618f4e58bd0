"""This tree beside another one in one process: are steps under its plans as fast, and as small?

The other tree's package is copied under another name. Both plan the same model for the same budget
from the same costs; the arms take turns, this tree's twice, whose difference is the noise.

    git worktree add ../before 573e56b
    python -m experiments.beside ../before [MODEL ...] [--quick] [--rounds N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import actckpt
from experiments.arguments import among
from experiments.peers.models import MODELS, SEED, built
from experiments.peers.trial import Arm, Reference, tried
from experiments.results import FOLDER, circumstances, markdown_table, write_markdown
from experiments.timing import interleaved, ratio

NAME = "actckpt_before"
POLICIES = ("auto", "calls")
SHARE = 0.5  # of the untouched activations
ROUNDS = 15
STARTED = ("gpt2", "llama", "resnet50", "t5")

Row = dict[str, Any]


def other_tree(tree: Path, folder: Path) -> ModuleType:
    """The package of a tree, imported under another name from a copy in ``folder``."""
    shutil.copytree(tree / "actckpt", folder / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / NAME).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\bactckpt\b", NAME, text), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(NAME)


def rows_of(name: str, tree: Path, quick: bool, rounds: int) -> list[Row]:
    """A row for each policy."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    subject = built(name, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        # each tree would keep costs under its own name, and plan by what it has measured itself
        os.environ.setdefault("ACTCKPT_CACHE", folder)
        before = other_tree(tree, Path(folder))
        untouched, first = _tried(subject, copy.deepcopy(subject.model), None)
        rows = []
        for policy in POLICIES:
            arms = {"untouched": untouched}
            for arm, library in (("now", actckpt), ("before", before), ("now again", actckpt)):
                model = copy.deepcopy(subject.model)
                library.optimize(
                    model,
                    SHARE * untouched.peak_bytes / 1e9,
                    batch=subject.batch,
                    policy=policy,
                    scope="activations",
                    **subject.loss,
                )
                arms[arm], _ = _tried(subject, model, first)
            times = interleaved({n: a.run for n, a in arms.items()}, rounds=rounds, seed=SEED)
            to_before = ratio(times["now"], times["before"])
            noise = ratio(times["now again"], times["now"])
            rows.append(
                {
                    "model": name,
                    "policy": policy,
                    "budget_bytes": round(SHARE * untouched.peak_bytes),
                    "peak_bytes": {n: a.peak_bytes for n, a in arms.items()},
                    "equal": all(a.gradients == 0 and a.buffers == 0 for a in arms.values()),
                    "now_over_before": [to_before.low, to_before.median, to_before.high],
                    "now_again_over_now": [noise.low, noise.median, noise.high],
                }
            )
    return rows


def _tried(subject: Any, model: torch.nn.Module, first: Reference | None) -> tuple[Arm, Reference]:
    return tried(subject, model, model, first)


def table(rows: list[Row]) -> str:
    """A line for every row."""

    def cells(row: Row) -> list[str]:
        peaks = row["peak_bytes"]
        return [
            f"{row['model']}, {row['policy']}",
            f"{row['budget_bytes'] / 1e6:.2f} MB",
            f"{peaks['before'] / 1e6:.3f} MB",
            f"{peaks['now'] / 1e6:.3f} MB",
            "{1:.3f} ({0:.3f}–{2:.3f})".format(*row["now_over_before"]),
            "{1:.3f} ({0:.3f}–{2:.3f})".format(*row["now_again_over_now"]),
            "equal" if row["equal"] else "DIFFER",
        ]

    columns = ["", "budget", "peak before", "peak now", "step, now / before", "now / now", "bits"]
    return markdown_table(columns, [cells(row) for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.beside", description=__doc__)
    parser.add_argument("tree", type=Path, help="the other tree")
    parser.add_argument("models", nargs="*", type=among("model", MODELS), metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds, at least 2")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of beside.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.models or list(STARTED)
    if not (options.tree / "actckpt" / "api.py").exists():
        parser.error(f"not a tree of actckpt: {options.tree}")
    if options.one:  # the process of one model
        print(json.dumps(rows_of(names[0], options.tree, options.quick, options.rounds)))
        return 0
    rows: list[Row] = []
    for name in names:
        command = [sys.executable, "-m", "experiments.beside", str(options.tree), name, "--one"]
        command += ["--rounds", str(options.rounds), *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    commit = subprocess.run(
        ["git", "-C", str(options.tree), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    about = circumstances(
        {"torch": torch.__version__},
        before=commit or "unknown",
        budget="half of the untouched activations, which is what it bounds",
        time="processor time of one thread, arms interleaved, medians and quartiles of the ratios",
        rounds=options.rounds,
    )
    parts = ["# This tree beside an earlier one", table(rows)]
    write_markdown("beside", about, *parts, folder=options.out)
    print("\n\n".join(parts))
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
