"""Ranks that are killed or stopped while they save together: ``python -m tests.faults.ranks``.

Every rank is a forked process, so that torch is started once. A fault comes before one system call
of the second save, or before one message of it. ``--whole`` tries each of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor

import actckpt
import actckpt.resuming.together
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.errors import CheckpointError
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.waiting import Patience
from tests.faults.rank_mutants import CALM, MUTANTS, VANISHED, Fault
from tests.system_calls import Call, Watched, before

SILENCE_S = 2.0
# of a save with a fault: others wait for the silence, and then some
MOST_S = 15.0


@dataclass(slots=True)
class Played:
    """What came of it, by rank: verdicts of both saves, seconds of the second, what was counted."""

    said: dict[int, dict[str, Any]]
    fired: bool
    wrong: list[str]


def _intact() -> None:
    """Nothing is broken."""


def play(folder: Path, world: int, fault: Fault, breaks: Callable[[], None] = _intact) -> Played:
    """Two saves of so many ranks, with a fault in the second.

    Args:
        breaks: called in every rank before.
    """
    pipes = [os.pipe() for _ in range(world)]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            try:
                breaks()
                _rank(folder, rank, world, fault, pipes[rank][1])
            except BaseException as error:
                os.write(pipes[rank][1], json.dumps({"error": repr(error)[:500]}).encode())
            finally:
                os._exit(0)
        pids.append(pid)
    for _, writing in pipes:
        os.close(writing)
    stopped, killed = _await(pids)
    for rank in stopped:
        os.kill(pids[rank], signal.SIGCONT)
    killed |= _await([pids[rank] for rank in stopped])[1]
    said = {}
    for rank, (reading, _) in enumerate(pipes):
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        if text:
            said[rank] = json.loads(text)
    fired = bool(stopped) or killed or fault.where == "vanish"
    return Played(said, fired, _wrong(folder / "run", said, fault, fired))


def _await(pids: list[int]) -> tuple[list[int], bool]:
    """Which of them were stopped, and whether one was killed, once the others have ended."""
    left = dict(enumerate(pids))
    stopped, killed = [], False
    while left:
        for rank, pid in list(left.items()):
            found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
            if not found:
                continue
            del left[rank]
            if os.WIFSTOPPED(status):
                stopped.append(rank)
            killed |= os.WIFSIGNALED(status)
        time.sleep(0.01)
    return stopped, killed


def _rank(folder: Path, rank: int, world: int, fault: Fault, pipe: int) -> None:
    armed = False
    counts: Counter[str] = Counter()

    def strike(where: str) -> None:
        if armed:
            if fault.rank in (rank, -1) and (fault.where, fault.at) == (where, counts[where]):
                os.kill(os.getpid(), fault.signal)
            counts[where] += 1

    tell = Exchange.tell

    def telling(self: Exchange, key: str, message: Any) -> None:
        strike("message")
        tell(self, key, message)
        if armed and fault.where == "vanish" and fault.rank == rank and "/vote/" in key:
            for path in (folder / "run").glob(f".saving-*/model-{rank:05d}.safetensors"):
                path.unlink()

    def calling(call: Call) -> None:
        strike("call")
        strike(call.name)

    Exchange.tell = telling  # type: ignore[method-assign]
    port = os.environ.get("ACTCKPT_STORE_PORT")
    store: Any = (
        dist.TCPStore("127.0.0.1", int(port), world, rank == 0)  # type: ignore[attr-defined]
        if port
        else dist.FileStore(str(folder / "store"), world)  # type: ignore[attr-defined]
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=20),
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = actckpt.Checkpointer(
        folder / "run",
        model=model,
        optimizer=optimizer,
        every=None,
        keep_last=1,
        on_sigterm=None,
        on_difference=None,
        rank_silence=f"{SILENCE_S}s",
        rank_timeout=f"{MOST_S / 2}s",
        files=Files(Watched(before(calling))),
    )
    exchange = run._company._exchange  # type: ignore[attr-defined]
    # until the fault nothing is to be lost where the machine stands still for a moment
    impatient, exchange.patience = exchange.patience, Patience(10.0, 20.0)
    run.resume()
    said: dict[str, Any] = {"verdicts": []}
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        run.step()
        begin = time.monotonic()
        try:
            run.save()
        except CheckpointError as error:
            said["reason"] = str(error)
        said["verdicts"].append(run.last_save.verdict if run.last_save else "")
        said["seconds"] = time.monotonic() - begin
        armed = not armed
        exchange.patience = impatient
    said["counts"] = counts
    os.write(pipe, json.dumps(said).encode())
    run.close()


def _wrong(
    directory: Path, said: dict[int, dict[str, Any]], fault: Fault, fired: bool
) -> list[str]:
    """In what a promise was broken."""
    wrong = [f"rank {r} raised {s['error']}" for r, s in said.items() if "error" in s]
    said = {r: s for r, s in said.items() if "error" not in s}
    if any(s["verdicts"][0] != "committed" for s in said.values()):
        wrong.append("the save before the fault was not committed")
    found = discover(Files(), str(directory))
    steps = [c.step for c in found.checkpoints]
    for checkpoint in found.checkpoints:
        try:
            checkpoint.verify()
        except CheckpointError as error:
            wrong.append(f"there is a checkpoint that does not verify: {error}")
    if found.skipped or not steps or not set(steps) <= {1, 2}:
        wrong.append(f"there are checkpoints of {steps}, and {found.skipped}")
    verdicts = {r: s["verdicts"][1] for r, s in said.items()}
    if {"committed", "failed"} <= set(verdicts.values()):
        wrong.append(f"the verdicts are {verdicts}")
    if "committed" in verdicts.values() and 2 not in steps:
        wrong.append("a rank took it for committed, and it is not there")
    if "failed" in verdicts.values() and 2 in steps:
        wrong.append(f"a rank took it for failed, and it is there: {said}")
    if not fired and set(verdicts.values()) != {"committed"}:
        wrong.append(f"nothing happened, and the verdicts are {verdicts}")
    victims = set(said) if fault.rank < 0 else {fault.rank}
    slow = {r: s["seconds"] for r, s in said.items() if s["seconds"] > MOST_S and r not in victims}
    if slow:
        wrong.append(f"ranks waited: {slow}")
    return wrong


def faults(counted: dict[int, dict[str, int]], step: int) -> Iterator[Fault]:
    """Every ``step``-th place for a fault of each rank.

    Args:
        counted: how many calls and messages each rank makes.
    """
    for kind in (signal.SIGKILL, signal.SIGSTOP):
        for rank, counts in counted.items():
            for where, count in counts.items():
                yield from (Fault(kind, rank, where, at) for at in range(0, count, step))
    for where, count in counted[0].items():
        yield from (Fault(signal.SIGKILL, -1, where, at) for at in range(0, count, step))


def few(counted: dict[int, dict[str, int]]) -> Iterator[Fault]:
    """One of each kind: in the middle of a share, before the verdict, after the name."""
    yield Fault(signal.SIGKILL, 1, "call", counted[1]["call"] // 2)
    yield Fault(signal.SIGKILL, 0, "message", counted[0]["message"] - 1)
    yield Fault(signal.SIGKILL, 0, "call", counted[0]["call"] * 9 // 10)
    yield Fault(signal.SIGSTOP, 1, "call", counted[1]["call"] // 4)
    yield VANISHED


def scan(
    folder: Path,
    world: int,
    chosen: Callable[[dict[int, dict[str, int]]], Iterator[Fault]],
    tell: Callable[[str], None],
    jobs: int = 1,
) -> tuple[int, list[str]]:
    """How many faults came to pass, and what went wrong.

    Args:
        jobs: how many are tried at once; most of the time ranks wait for one that is silent.
    """
    (folder / "calm").mkdir()
    first = play(folder / "calm", world, CALM)
    wrong = [f"without a fault: {text}" for text in first.wrong]
    fired = 0
    if wrong:
        return 0, wrong
    counted = {
        rank: {where: said["counts"][where] for where in ("call", "message")}
        for rank, said in first.said.items()
    }
    places = [(folder / str(n), world, fault) for n, fault in enumerate(chosen(counted))]
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for (_, _, fault), played in zip(places, pool.map(_tried, places), strict=True):
            fired += played.fired
            verdicts = {r: s.get("verdicts", s) for r, s in played.said.items()}
            tell(f"{fault}: {verdicts} {'; '.join(played.wrong)}")
            wrong += [f"{fault}: {text}" for text in played.wrong]
    return fired, wrong


def _tried(place: tuple[Path, int, Fault]) -> Played:
    """One fault, in a folder of its own, of which nothing stays."""
    folder, world, fault = place
    folder.mkdir()
    try:
        return play(folder, world, fault)
    finally:
        shutil.rmtree(folder)


def mutants(folder: Path, tell: Callable[[str], None]) -> list[str]:
    """The names of those that got away."""
    away = []
    for name, mutant in MUTANTS.items():
        place = folder / name
        place.mkdir()
        wrong = play(place, 2, mutant.fault, mutant.breaks).wrong
        caught = any(mutant.harm in text for text in wrong)
        tell(f"mutant {name}: {'; '.join(wrong)[:200] if caught else 'GOT AWAY'}")
        away += [] if caught else [name]
    return away


def main() -> int:
    """Exit status 1 if anything broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ranks", description=__doc__)
    parser.add_argument("--whole", action="store_true", help="every place; some minutes")
    parser.add_argument("--every", type=int, default=12, help="every so-manieth of them")
    parser.add_argument("--few", action="store_true", help="one of each kind")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="how many faults at once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        every = partial(faults, step=1 if args.whole else args.every)
        fired, wrong = scan(
            Path(folder),
            args.world,
            few if args.few else every,
            lambda line: print(line, flush=True),
            args.jobs,
        )
        away = mutants(Path(folder), lambda line: print(line, flush=True))
    wrong += [f"mutant {name} got away" for name in away]
    print(f"{fired} faults, {len(wrong)} violations")
    for line in wrong:
        print("   ", line)
    return 1 if wrong or not fired else 0


if __name__ == "__main__":
    sys.exit(main())
