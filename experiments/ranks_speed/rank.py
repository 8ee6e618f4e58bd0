"""What one rank does: the arms, round by round; rank 0 writes what all of them took.

``python -m experiments.ranks_speed.rank FOLDER PHASE MIB ROUNDS`` under RANK, WORLD_SIZE and so on.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import actckpt

SEED = 0
MIB = 1 << 20
# called for the stall; what it returns is called until the state is durable
Arm = Callable[[Path], Callable[[], object]]


class Subject:
    """A model cut over all ranks, with AdamW, and every way to save and to load it.

    Args:
        folder: where all ranks write.
        mib: size of the state of all ranks together.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        torch.manual_seed(SEED)
        self.folder = folder
        # parameters of 1 MiB; AdamW has two more of each
        weights = nn.ParameterList(torch.randn(512, 512) for _ in range(round(mib / 3)))
        self.model = nn.Module()
        self.model.weights = weights
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.share = [
            t.to_local() if isinstance(t, DTensor) else t
            for t in (
                *self.model.parameters(),
                *(v for values in self.optimizer.state.values() for v in values.values()),
            )
        ]
        self.target = [torch.zeros_like(t) for t in self.share]
        self.share_bytes = sum(t.nbytes for t in self.share)
        self.runs = {
            name: actckpt.Checkpointer(
                folder / name,
                model=self.model,
                optimizer=self.optimizer,
                every=None,
                keep_last=None,
            )
            for name in ("behind", "behind again", "at once")
        }

    def state(self) -> dict[str, Any]:
        """What DCP is given."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def saving(self) -> dict[str, Arm]:
        """Ways to save, and what they are measured against."""
        thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
        return {
            "memcpy of the shares": lambda _: self._copy(),
            "dd conv=fsync of the shares": self._dd,
            "actckpt": lambda _: self._behind("behind"),
            "actckpt again": lambda _: self._behind("behind again"),
            "actckpt, background=False": lambda _: self._at_once(),
            "DCP save": self._dcp,
            "DCP async_save, thread": lambda path: self._dcp_async(path, thread),
            "DCP async_save, process": lambda path: self._dcp_async(path, process),
        }

    def loading(self) -> dict[str, Arm]:
        """Ways to load what another world has saved."""
        return {
            "actckpt restore": lambda _: self._restored(),
            "actckpt restore again": lambda _: self._restored(),
            "DCP load": lambda _: self._dcp_load(),
        }

    def clear(self) -> None:
        """Removes what the arms have written; nothing of it is timed."""
        dist.barrier()
        if not dist.get_rank():
            for path in (*self.folder.glob("arm-*"), *self.folder.glob("*/step-*")):
                shutil.rmtree(path)
            os.sync()
        dist.barrier()

    def _copy(self) -> Callable[[], object]:
        for to, tensor in zip(self.target, self.share, strict=True):
            to.copy_(tensor)
        return _nothing

    def _dd(self, path: Path) -> Callable[[], object]:
        path.mkdir(exist_ok=True)
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={path}/{dist.get_rank()}", "bs=1M",
             f"count={self.share_bytes // MIB}", "conv=fsync"], check=True, capture_output=True,
        )  # fmt: skip
        return _nothing

    def _behind(self, name: str) -> Callable[[], object]:
        run = self.runs[name]
        run.step()
        run.save(wait=False)
        return run.save

    def _at_once(self) -> Callable[[], object]:
        run = self.runs["at once"]
        run.step()
        run.save()
        return _nothing

    def _dcp(self, path: Path) -> Callable[[], object]:
        dcp.state_dict_saver.save(self.state(), checkpoint_id=path)
        return _nothing

    def _dcp_async(self, path: Path, kind: AsyncCheckpointerType) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            self.state(), checkpoint_id=path, async_checkpointer_type=kind
        )
        return lambda: future.result()

    def _restored(self) -> Callable[[], object]:
        self.runs["at once"].restore()
        return _nothing

    def _dcp_load(self) -> Callable[[], object]:
        state = self.state()
        dcp.state_dict_loader.load(state, checkpoint_id=self.folder / "dcp")
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        return _nothing


def _nothing() -> None:
    """Is left to wait for."""


def rounds_of(subject: Subject, arms: dict[str, Arm], rounds: int) -> dict[str, Any]:
    """Of every arm, seconds until the last rank goes on and until the last is done.

    Every arm in every round, in an order drawn anew; the first round warms up and is not kept.
    """
    names, order = list(arms), random.Random(SEED)
    times: dict[str, Any] = {name: {"stall_s": [], "durable_s": []} for name in names}
    for number in range(rounds + 1):
        for name in order.sample(names, len(names)):
            dist.barrier()
            begin = time.perf_counter()
            finish = arms[name](subject.folder / f"arm-{names.index(name)}")
            stall_s = time.perf_counter() - begin
            finish()
            taken = torch.tensor([stall_s, time.perf_counter() - begin])
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number:
                times[name]["stall_s"].append(taken[0].item())
                times[name]["durable_s"].append(taken[1].item())
            if "restore" not in name and "load" not in name:
                subject.clear()
    return times


def main(folder: Path, phase: str, mib: int, rounds: int) -> None:
    """One phase: ``save`` also leaves a checkpoint of each kind, which ``load`` reads."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    dist.init_process_group("gloo")
    subject = Subject(folder, mib)
    if phase == "save":
        found = rounds_of(subject, subject.saving(), rounds)
        subject._at_once()
        subject._dcp(folder / "dcp")
    else:
        found = rounds_of(subject, subject.loading(), rounds)
    if not dist.get_rank():
        versions = subject.runs["at once"].list()[0].manifest.versions
        about = {"times": found, "versions": versions, "share_bytes": subject.share_bytes}
        (folder / f"{phase}.json").write_text(json.dumps(about), encoding="utf-8")
    for run in subject.runs.values():
        run.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
