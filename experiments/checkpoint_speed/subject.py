"""The state that is saved, what a save is measured against, and ours."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import actckpt

MIB = 1 << 20
SEED = 0
AT_ONCE = "background=False"
UNVERIFIED = 'background=False, verify="manifest"'

# called for the stall; what it returns is called until the state is durable
Arm = Callable[[Path], Callable[[], object]]


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
                folder / name,
                model=self.model,
                optimizer=self.optimizer,
                every=None,
                keep_last=None,
                verify=verify,
            )
            for name, verify in (
                ("behind", "full"),
                ("behind again", "full"),
                ("at once", "full"),
                ("unverified", "manifest"),
            )
        }

    def state(self) -> dict[str, Any]:
        """What peers are given."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def arms(self) -> dict[str, Arm]:
        """What a save is measured against, and ours."""
        return {
            "memcpy, in one piece": lambda _: self.copy(),
            "memcpy, tensor by tensor": lambda _: self.copy_tensors(),
            "memcpy, tensor by tensor again": lambda _: self.copy_tensors(),
            "dd conv=fsync": self.dd,
            "dd conv=fsync again": self.dd,
            "actckpt": lambda _: self.behind("behind"),
            "actckpt again": lambda _: self.behind("behind again"),
            f"actckpt, {AT_ONCE}": lambda _: self.at_once("at once"),
            f"actckpt, {UNVERIFIED}": lambda _: self.at_once("unverified"),
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

    def clear(self) -> None:
        """Removes what the arms have written; nothing of it is timed."""
        for path in self.folder.glob("peer-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in self.runs:
            for path in (self.folder / name).glob("step-*"):
                shutil.rmtree(path)
        os.sync()
