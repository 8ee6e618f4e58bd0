"""Trainings under torchrun whose processes are killed: ``python -m tests.faults.torchrun``.

Under each trainer two processes train untouched, and then under a plan with checkpoints. Of these
one is killed, then the other, then both at once, each time in the middle of a step; the same
command is started again after each. Compared are every loss, weights, optimizer, and what is drawn
next.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.trained_by_ranks import KINDS, Seen, trained

LIMIT_S = 300
# who is killed, after which step
KILLS = (((0,), 4), ((1,), 7), ((0, 1), 9))


def launched(folder: Path, kind: str, name: str, *options: str) -> tuple[int, float]:
    """Starts two processes; torchrun's exit status, and how many seconds it took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.faults.torchrun", "--of", kind]
    begin = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        done = subprocess.run(
            [*command, "--name", name, "--folder", str(folder), *options],
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=log,
            stderr=log,
            timeout=LIMIT_S,
            check=False,
        )
    return done.returncode, time.monotonic() - begin


def one_process(kind: str, name: str, folder: Path, kill: list[int]) -> None:
    """What torchrun starts.

    Args:
        kill: a step and the ranks that end after it; [] for none.
    """
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    kept = {"checkpoints": folder / "run", "every": 3, "policy": "full"}

    def end() -> None:
        if rank in kill[1:]:
            while not [*(folder / "run").glob("step-*")]:
                time.sleep(0.01)  # with nothing to go on from, it would begin anew
            os.kill(os.getpid(), signal.SIGKILL)

    if name == "whole":
        seen = Seen(3)
    else:
        seed = 11 if name == "last" else 3
        seen = Seen(seed, kept, kill[0] if kill else -1, end)
    found = trained(folder / name, kind, seen)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def wrong(folder: Path, rank: int) -> list[str]:
    """What of a process's last part is other than the whole."""

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / f"{name}-{rank}.json").read_text("utf-8"))
        return found

    whole, last = read("whole"), read("last")
    found = [name for name in ("state", "drawn") if whole[name] != last[name]]
    for name in ("losses", "logged"):
        if whole[name][len(whole[name]) - len(last[name]) :] != last[name]:
            found.append(name)
    step, inexact = last["resumed"] or [0, ["not resumed"]]
    if last["difference"] != "None" or not step:
        found.append(f"steps made again: {last['difference']}")
    return [*found, *inexact]


def killed(kind: str) -> bool:
    """Whether one trainer's runs come out as the whole one; says so."""
    folder = Path(tempfile.mkdtemp(prefix=f"actckpt-{kind}-"))
    status, _ = launched(folder, kind, "whole")
    assert not status, (folder / "whole.log").read_text("utf-8", "replace")[-4000:]
    line = []
    for number, (ranks, step) in enumerate(KILLS):
        kill = ["--kill", str(step), *map(str, ranks)]
        status, took_s = launched(folder, kind, f"killed-{number}", *kill)
        assert status, f"nobody was killed in {folder}"
        line.append(f"{'+'.join(map(str, ranks))} after {step} ({took_s:.0f} s)")
    status, _ = launched(folder, kind, "last")
    assert not status, (folder / "last.log").read_text("utf-8", "replace")[-4000:]
    bad = {rank: found for rank in range(2) if (found := wrong(folder, rank))}
    last = json.loads((folder / "last-0.json").read_text("utf-8"))
    print(  # noqa: T201
        f"{kind}: killed rank {', '.join(line)}; went on from step {last['resumed'][0]}, last save "
        f"{last['saved']}; other than the whole run: {bad or 'nothing'}",
        flush=True,
    )
    return not bad


def main() -> int:
    """0 where every run came out as it would have."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.faults.torchrun")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    for hidden in ("--of", "--name"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=int, nargs="+", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        one_process(args.of, args.name, args.folder, args.kill)
        return 0
    if unknown := {*args.kinds} - {*KINDS}:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    outcomes = [killed(kind) for kind in args.kinds or KINDS]
    return int(not all(outcomes))


if __name__ == "__main__":
    sys.exit(main())
