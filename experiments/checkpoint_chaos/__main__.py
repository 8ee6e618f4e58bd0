"""Runs ckpt-chaos (PyPI, 0.1.8) on a training with checkpoints; what came of it as a page.

``pip install --target TOOL --no-deps ckpt-chaos==0.1.8`` and then
``python -m experiments.checkpoint_chaos TOOL``; not in CI: it takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.results import FOLDER

ROOT = Path(__file__).parent.parent.parent
PAGE = FOLDER / "checkpoint_chaos.md"
VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the tool.

    Args:
        points: how many of the file events it kills at, evenly spread.
        options: of the training.
        tool: further options of the tool.
    """

    name: str
    points: int
    modes: str
    options: tuple[str, ...] = ("--at-once",)
    tool: tuple[str, ...] = ()


CASES = (
    Case("one process, saves at once", 16, "before,unsynced"),
    Case("one process, saves in the background", 12, "before,term", ()),
    Case("two ranks, rank 0 killed", 10, "before", tool=("--ranks", "2")),
    Case("two ranks, rank 1 killed", 10, "before", tool=("--ranks", "2", "--crash-rank", "1")),
    Case("one process, a build without fsync", 6, "unsynced", ("--at-once", "--forgetful")),
)


def run(case: Case, tool: Path, work: Path) -> Counter[str]:
    """How often each verdict was given."""
    command = [
        *(sys.executable, "-m", "ckpt_chaos", "run"),
        *("--step-regex", r"resumed from step (\d+)", "--result-file", "{out}/final.txt"),
        # a manifest says when it was written: the number of its bytes varies
        *("--checkpoint-glob", "{out}/run/step-*", "--ckpt-ignore-size"),
        *("--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK"),
        *("--max-points", str(case.points), "--modes", case.modes, "--work", str(work)),
        *("--grace", "30", *case.tool, "--"),
        *(sys.executable, "-m", "experiments.checkpoint_chaos.train", "{out}", *case.options),
    ]
    paths = [str(tool), str(ROOT)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(f"{case.name}\n{done.stdout[-1500:]}{done.stderr[-1500:]}\n")
    sys.stdout.flush()
    rows = [json.loads(p.read_text("utf-8")) for p in sorted(work.glob("pt_*/result.json"))]
    found: Counter[str] = Counter()
    for row in rows:
        found[verdict(row)] += 1
        found["killed"] += row["crashed"]
    return found


def verdict(row: dict[str, object]) -> str:
    """What the tool says of one point, by its own rule."""
    outcome = row["outcome"]
    assert isinstance(outcome, dict)
    if outcome["raised"] is not None:
        return "HARD_FAIL"
    if outcome["weights_diff"] != 0:
        return "SILENT_DIVERGENCE"
    older = (outcome["resumed_from_step"] or 0) < outcome["newest_complete_step"]
    return "LOST_WORK" if older else "PASS"


def main() -> None:
    """Runs all, or some, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", type=Path, help="the folder that ckpt-chaos was installed into")
    parser.add_argument("--case", type=int, action="append", help="number, from 0; by default all")
    args = parser.parse_args()
    lines = []
    for number in args.case or range(len(CASES)):
        case = CASES[number]
        with tempfile.TemporaryDirectory() as folder:
            found = run(case, args.tool.absolute(), Path(folder) / "work")
        cells = [str(found[name]) for name in VERDICTS]
        lines.append(f"| {case.name} | {case.modes} | {found['killed']} | {' | '.join(cells)} |\n")
        PAGE.write_text(page(lines), encoding="utf-8")


def page(lines: list[str]) -> str:
    """The results, and what they do not say."""
    return (
        "# Under ckpt-chaos\n\n"
        f"`python -m experiments.checkpoint_chaos TOOL`, ckpt-chaos 0.1.8, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores shared. "
        "Each training makes 12 steps and a checkpoint at every fourth; the tool kills it before "
        "one of its file events, or sends SIGTERM there, starts it again and compares the weights "
        "that it comes to. A run that is not killed is counted as a PASS, too.\n\n"
        "| training | modes | killed | PASS | HARD_FAIL | SILENT_DIVERGENCE | LOST_WORK |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        f"{''.join(lines)}\n"
        "What the tool cannot see: it counts files as they are opened, renamed and deleted, and "
        "not what is written into them; `unsynced` takes back what was written since the last "
        "fsync of files that Python's `open` has opened, and ours are opened by `os.open`. So a "
        "build that makes nothing durable passes: the last line. `python -m tests.faults` takes "
        'power away at every system call, and finds it: its mutant "no fsync of files" is caught. '
        "Nor does it turn bits, fill a disk, or stop a rank; `make faults` does.\n"
    )


if __name__ == "__main__":
    main()
