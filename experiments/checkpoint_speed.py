"""What a checkpoint costs: the stall of training, the time until it is durable, and the way back.

Every round runs every arm once on the same state, beginning with the next one each time; arms
that are there twice say how large the noise is. Wall time: it is mostly waiting for a disk.

    python -m experiments.checkpoint_speed --mib 256
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import actckpt
from experiments.progress import progress
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)

MIB = 1 << 20
SEED = 0

Row = dict[str, Any]


@dataclass(slots=True)
class Times:
    """Seconds of one arm, round by round.

    Args:
        stall_s: until training may go on.
        durable_s: until the state is on the device; equal for what only reads or copies.
    """

    stall_s: list[float] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)


class Layers(nn.Module):
    """As many parameters of 1 MiB as a third of the state takes; AdamW has the rest."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(512, 512) for _ in range(round(mib / 3)))


class Subject:
    """A state, and every way to save it.

    Args:
        folder: where the arms write.
        mib: size of the state.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        torch.manual_seed(SEED)
        self.folder = folder
        self.model = Layers(mib)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tensors: list[torch.Tensor] = [*self.model.parameters()]
        for values in self.optimizer.state.values():
            tensors += [v for v in values.values() if v.numel() > 1]
        self.tensors = tensors
        self.size_bytes = sum(t.numel() * t.itemsize for t in tensors)
        self.source = np.random.default_rng(SEED).integers(0, 256, self.size_bytes, np.uint8)
        self.target = np.zeros_like(self.source)
        self.runs = {
            name: actckpt.Checkpointer(
                folder / name, model=self.model, optimizer=self.optimizer, keep_last=None
            )
            for name in ("behind", "behind again", "at once")
        }
        self.runs["unverified"] = actckpt.Checkpointer(
            folder / "unverified",
            model=self.model,
            optimizer=self.optimizer,
            keep_last=None,
            verify="manifest",
        )

    def state(self) -> dict[str, Any]:
        """What peers are given."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def arms(self) -> dict[str, Callable[[Path], Callable[[], object]]]:
        """Each is called for the stall; what it returns is called until the state is durable."""
        return {
            "memcpy, in one piece": lambda _: self.copy(),
            "memcpy, tensor by tensor": lambda _: self.copy_tensors(),
            "memcpy, tensor by tensor again": lambda _: self.copy_tensors(),
            "dd conv=fsync": self.dd,
            "dd conv=fsync again": self.dd,
            "actckpt": lambda _: self.behind("behind"),
            "actckpt again": lambda _: self.behind("behind again"),
            "actckpt, background=False": lambda _: self.at_once("at once"),
            'actckpt, background=False, verify="manifest"': lambda _: self.at_once("unverified"),
            "torch.save + fsync": self.torch_save,
            "DCP save": self.dcp_save,
            "DCP async_save, thread": lambda p: self.dcp_async(p, AsyncCheckpointerType.THREAD),
            "DCP async_save, process": lambda p: self.dcp_async(p, AsyncCheckpointerType.PROCESS),
        }

    def copy(self) -> Callable[[], object]:
        np.copyto(self.target, self.source)
        return lambda: None

    def copy_tensors(self) -> Callable[[], object]:
        at = self.target.ctypes.data
        for tensor in self.tensors:
            ctypes.memmove(at, tensor.data_ptr(), tensor.nbytes)
            at += tensor.nbytes
        return lambda: None

    def dd(self, path: Path) -> Callable[[], object]:
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={self.size_bytes // MIB}",
             "conv=fsync"], check=True, capture_output=True,
        )  # fmt: skip
        return lambda: None

    def behind(self, name: str) -> Callable[[], object]:
        run = self.runs[name]
        run.step()
        run.save(wait=False)
        return run.save

    def at_once(self, name: str) -> Callable[[], object]:
        run = self.runs[name]
        run.step()
        run.save()
        return lambda: None

    def torch_save(self, path: Path) -> Callable[[], object]:
        with open(path, "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    def dcp_save(self, path: Path) -> Callable[[], object]:
        dcp.state_dict_saver.save(self.state(), checkpoint_id=path)
        return lambda: None

    def dcp_async(self, path: Path, kind: AsyncCheckpointerType) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            self.state(), checkpoint_id=path, async_checkpointer_type=kind
        )
        return lambda: future.result()

    def clear(self) -> None:
        """Removes what the arms have written; nothing of it is timed."""
        for path in self.folder.glob("peer-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in self.runs:
            for path in (self.folder / name).glob("step-*"):
                shutil.rmtree(path)
        os.sync()


def measured(subject: Subject, rounds: int) -> dict[str, Times]:
    """Every arm in every round; the first round warms up and is not kept."""
    arms = subject.arms()
    names = list(arms)
    times = {name: Times() for name in names}
    with progress(rounds + 1, "rounds") as done:
        for number in range(rounds + 1):
            start = number % len(names)
            for name in names[start:] + names[:start]:
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
    """The way back, from the page cache: ours, and safetensors' own of the same files."""
    run = subject.runs["at once"]
    run.step()
    path = run.save().path

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
        ratios["a save"].append(statistics.mean(step() for _ in range(20)) / base)
        run.save()
        subject.clear()
    return {name: statistics.median(values) for name, values in ratios.items()}


def rows_of(times: dict[str, Times]) -> list[Row]:
    rows = []
    for name, found in times.items():
        row: Row = {"arm": name}
        for kind, values in (("stall", found.stall_s), ("durable", found.durable_s)):
            low, median, high = statistics.quantiles(values, n=4)
            row[f"{kind}_s"] = {"median": median, "low": low, "high": high, "all": values}
        rows.append(row)
    return rows


def draw(name: str, rows: list[Row]) -> None:
    """Stall and durable time of every arm as bars, with the rounds as points."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    for at, row in enumerate(reversed(rows)):
        for kind, color, height in (("durable", "#c6d4e3", 0.7), ("stall", "#1f5a94", 0.35)):
            axes.barh(at, row[f"{kind}_s"]["median"], height, color=color)
            points = row[f"{kind}_s"]["all"]
            axes.plot(points, [at] * len(points), "|", color="black", markersize=4)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    axes.set_xlabel("seconds: dark until training goes on, light until durable")
    figure.savefig(FOLDER / f"{name}.png", dpi=120)


def shown(value: Row) -> str:
    return f"{value['median']:.3f} ({value['low']:.3f}–{value['high']:.3f}) s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )  # asynchronous DCP asks for one
        subject = Subject(folder, options.mib)
        writing = rows_of(measured(subject, options.rounds))
        back = rows_of(reading(subject, options.rounds))
        slower = slowdown(subject, options.rounds)
        versions = subject.runs["behind"].save().manifest.versions
        staging_bytes = subject.runs["behind"].staging_bytes
        for run in subject.runs.values():
            run.close()
    by_name = {row["arm"]: row for row in (*writing, *back)}

    def median(arm: str, kind: str) -> float:
        return float(by_name[arm][f"{kind}_s"]["median"])

    ratios = {
        "stall / memcpy, tensor by tensor": median("actckpt", "stall")
        / median("memcpy, tensor by tensor", "stall"),
        "stall / memcpy, in one piece": median("actckpt", "stall")
        / median("memcpy, in one piece", "stall"),
        "stall / DCP async_save, thread": median("actckpt", "stall")
        / median("DCP async_save, thread", "stall"),
        "durable / dd": median("actckpt", "durable") / median("dd conv=fsync", "durable"),
        "durable / dd again": median("actckpt", "durable")
        / median("dd conv=fsync again", "durable"),
        "restore / load_file, xxh3": median("actckpt restore", "stall")
        / median("safetensors load_file, xxh3", "stall"),
        "training step during a save / without": slower["a save"],
        "training step without / without": slower["nothing"],
    }
    about = circumstances(
        versions,
        seed=SEED,
        rounds=options.rounds,
        state=f"{subject.size_bytes / MIB:.0f} MiB: parameters of 1 MiB with AdamW",
        staging=f"{staging_bytes / MIB:.0f} MiB",
        time="wall; median and quartiles; reading is from the page cache",
    )
    name = f"checkpoint_speed_{options.mib}"
    write_json_lines(name, about, [*writing, *back, {"ratios": ratios}])
    draw(name, writing)
    write_markdown(
        name,
        about,
        "# Checkpoint speed",
        "Stall: until training goes on. Durable: until the state is on the device; ours has read "
        "every byte back and verified it by then, the others have not. dd writes as many zeros.",
        markdown_table(
            ("", "stall", "durable"),
            [(r["arm"], shown(r["stall_s"]), shown(r["durable_s"])) for r in writing],
        ),
        markdown_table(("", "time"), [(r["arm"], shown(r["stall_s"])) for r in back]),
        markdown_table(("ratio of medians", ""), [(k, f"{v:.2f}") for k, v in ratios.items()]),
    )


if __name__ == "__main__":
    main()
