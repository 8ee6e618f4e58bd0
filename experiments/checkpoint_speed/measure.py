"""Rounds of arms, and what they took."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import xxhash
from safetensors.torch import load_file

from experiments.checkpoint_speed.subject import SEED, Arm, Subject
from experiments.progress import progress


@dataclass(slots=True)
class Times:
    """Seconds of one arm, round by round.

    Args:
        stall_s: until training may go on.
        durable_s: until the state is on the device; equal for what only reads or copies.
    """

    stall_s: list[float] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)


def measured(subject: Subject, arms: dict[str, Arm], rounds: int) -> dict[str, Times]:
    """Every arm in every round; the first round warms up and is not kept."""
    names = list(arms)
    order = random.Random(SEED)
    times = {name: Times() for name in names}
    with progress(rounds + 1, "rounds") as done:
        for number in range(rounds + 1):
            for name in order.sample(names, len(names)):
                begin = time.perf_counter()
                finish = arms[name](subject.folder / f"peer-{names.index(name)}")
                stall_s = time.perf_counter() - begin
                finish()
                durable_s = time.perf_counter() - begin
                if number:
                    times[name].stall_s.append(stall_s)
                    times[name].durable_s.append(durable_s)
                subject.clear()
            done("")
    return times


def reading(subject: Subject, rounds: int) -> dict[str, Times]:
    """The way back, from the page cache as after a save: ours, and safetensors' own."""
    run = subject.runs["at once"]
    run.step()
    saved = run.save()
    path = saved.path

    def load() -> None:
        """As `restore`: every byte is read and hashed, and put into the objects."""
        found = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        for file in path.glob("*.safetensors"):
            xxhash.xxh3_128_hexdigest(file.read_bytes())
        subject.model.load_state_dict(found["model"])
        state = subject.optimizer.state_dict()
        for key, values in state["state"].items():
            values.update({k: found["optimizer"][f"state/{key}/{k}"].clone() for k in values})
        subject.optimizer.load_state_dict(state)

    arms: dict[str, Callable[[], object]] = {
        "safetensors load_file, xxh3": load,
        "safetensors load_file, xxh3 again": load,
        "actckpt restore": run.restore,
        "actckpt verification": saved.verify,
    }
    times = {name: Times() for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            if number:
                times[name].stall_s.append(time.perf_counter() - begin)
                times[name].durable_s.append(times[name].stall_s[-1])
    subject.clear()
    return times


def _is_saving() -> bool:
    """Whether a thread of a Checkpointer's is writing."""
    return any(thread.name == "actckpt-save" for thread in threading.enumerate())


def slowdown(subject: Subject, rounds: int) -> dict[str, float]:
    """Time of training steps while a save is written, over that without one, round by round."""
    a, b = torch.randn(2, 768, 768).unbind()

    def step() -> float:
        begin = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        return time.perf_counter() - begin

    run = subject.runs["behind"]
    ratios: dict[str, list[float]] = {"nothing": [], "a save": []}
    for _ in range(rounds):
        base = statistics.median(step() for _ in range(20))
        ratios["nothing"].append(statistics.median(step() for _ in range(20)) / base)
        run.step()
        run.save(wait=False)
        found = []
        while _is_saving():
            taken_s = step()
            if _is_saving():  # to its end
                found.append(taken_s)
        if found:
            ratios["a save"].append(statistics.mean(found) / base)
        run.save()
        subject.clear()
    return {name: statistics.median(values) for name, values in ratios.items()}
