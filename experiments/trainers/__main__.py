"""Trainers that people use x (bitwise, peak within budget, killed and resumed, lines of code).

Every case is trained three times, each in a process of its own: untouched; under a budget that
leaves a share of what a step adds to models and optimizer, saving every step, killed by SIGKILL in
the middle of a step; and the rest of that, which is compared with the first to the last bit. Peaks
are what the allocator says of whole steps, all models and optimizer states included.

    python -m experiments.trainers [NAME ...] [--out FOLDER]

Lines of cases that were trained before stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)
from experiments.trainers.outcome import Outcome, is_same_run

KILLED_AFTER = 6
RESULTS = "trainers"
COLUMNS = (
    "trainer",
    "bitwise",
    "peak within budget, of it",
    "peak of untouched",
    "killed and resumed",
    "said of it",
    "lines of code",
)
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "lightning",
    "peft",
    "trl",
    "sentence-transformers",
)
Train = Callable[[Path, float | None, int | None], Outcome]


def cases() -> dict[str, tuple[Train, float, int]]:
    """Name -> how it is trained, the share for its budget, and the lines that a user adds."""
    from functools import partial

    from experiments.trainers import of_loops, of_transformers

    return {
        **{
            name: (partial(of_transformers.trained, build), share, of_transformers.LINES)
            for name, (build, share) in of_transformers.CASES.items()
        },
        "Lightning, LoRA": (of_loops.with_lightning, 0.75, of_loops.LIGHTNING_LINES),
        "accelerate, LoRA": (of_loops.with_accelerate, 0.75, of_loops.ACCELERATE_LINES),
    }


def trained(name: str, folder: Path, budget_gb: float | None, kill_after: int | None) -> Outcome:
    """One training in a process of its own; an empty outcome of one that was killed.

    Raises:
        RuntimeError: it failed.
    """
    given = json.dumps([name, str(folder), budget_gb, kill_after])
    command = [sys.executable, "-W", "ignore", "-m", "experiments.trainers", "--one", given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if kill_after is not None and done.returncode == -9:
        return Outcome()
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or str(done.returncode))
    found = json.loads(done.stdout.rpartition("OUTCOME ")[2])
    return Outcome(**{**found, "inexact": tuple(found["inexact"])})


def row(name: str, share: float, lines: int) -> list[str]:
    """The line of a case."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            whole = trained(name, folder / "whole", None, None)
            added = whole.peak_bytes - whole.resident_bytes
            budget_gb = (whole.resident_bytes + share * added) / 1e9
            trained(name, folder / "killed", budget_gb, KILLED_AFTER)
            rest = trained(name, folder / "killed", budget_gb, None)
        except RuntimeError as error:
            return [name, f"{error!s:.120}", *["–"] * 4, str(lines)]
    assert rest.losses
    same = is_same_run(whole, rest.losses, rest.weights)
    within = rest.peak_bytes <= budget_gb * 1e9
    used = rest.peak_bytes / (budget_gb * 1e9)
    return [
        name,
        "yes" if same else "no",
        f"{'yes' if within else 'no'}, {100 * used:.1f} %",
        f"{100 * rest.peak_bytes / whole.peak_bytes:.0f} %",
        f"at step {rest.resumed} of {len(whole.losses)}",
        "exact" if not rest.inexact else "; ".join(rest.inexact),
        str(lines),
    ]


def main() -> int:
    warnings.simplefilter("ignore")  # of the libraries about each other
    parser = argparse.ArgumentParser(prog="python -m experiments.trainers", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases; all of them by default")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of trainers.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = cases()
    if options.one is not None:
        import torch

        torch.set_num_threads(1)
        name, folder, budget_gb, kill_after = json.loads(options.one)
        Path(folder).mkdir(parents=True, exist_ok=True)
        outcome = found[name][0](Path(folder), budget_gb, kill_after)
        print("OUTCOME", json.dumps(asdict(outcome)))
        return 0
    if unknown := [name for name in options.names if name not in found]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(found)}")
    kept = read(options.out)
    for name in options.names or found:
        kept[name] = row(name, *found[name][1:])
        print(*kept[name], sep=" | ", flush=True)
        write([kept[n] for n in found if n in kept], options.out)
    return int(any(kept[name][1] != "yes" for name in options.names or found))


def read(folder: Path) -> dict[str, list[str]]:
    """Name -> line, of cases that were trained before."""
    path = folder / f"{RESULTS}.jsonl"
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()[1:])
    return {line["cells"][0]: line["cells"] for line in lines}


def write(rows: list[list[str]], folder: Path) -> None:
    """The results, one case after the other."""
    about = circumstances({name: version(name) for name in LIBRARIES}, policy="calls")
    parts = ["# Trainers", (__doc__ or "").split("\n\n")[1], markdown_table(COLUMNS, rows)]
    write_json_lines(RESULTS, about, [{"cells": cells} for cells in rows], folder=folder)
    write_markdown(RESULTS, about, *parts, folder=folder)


if __name__ == "__main__":
    sys.exit(main())
