"""What ranks read from storage of each other's checkpoints, counted at the system's calls.

``python -m tests.ranked_reading FOLDER SCENARIO RANK`` is one of the ranks of
`experiments.ranks_reading`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.system_calls import OperatingSystem
from tests.ranked import group

WORLDS = (1, 2, 4)
KINDS = ("DDP", "FSDP")
WIDTH = 1000


class Counting(OperatingSystem):
    """Counts what is read of files in checkpoints."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self._inside: dict[int, bool] = {}

    def open(self, path: str, flags: int, mode: int) -> int:
        fd = super().open(path, flags, mode)
        self._inside[fd] = "/step-" in path
        return fd

    def readinto(self, fd: int, buffer: memoryview, offset: int) -> int:
        count = super().readinto(fd, buffer, offset)
        self.read_bytes += count * self._inside.get(fd, False)
        return count


def begun(kind: str, world: int, folder: Path, calls: Counting) -> tuple[Any, nn.Module, Any]:
    """A run of two layers and AdamW."""
    torch.manual_seed(world)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    if kind == "FSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    run = actckpt.Checkpointer(
        folder, model=model, optimizer=optimizer, every=None, on_sigterm=None, files=Files(calls)
    )
    return run, model, optimizer


@contextmanager
def ranks(folder: Path, name: str, kind: str, rank: int, world: int) -> Iterator[bool]:
    """Whether this process is one of them; one of DistributedDataParallel is on its own."""
    if rank >= world:
        yield False
        return
    alone = world == 1 and kind == "DDP"
    # one after which the processes end is not taken apart
    last = name == f"{KINDS[-1]}-{WORLDS[-1]}-{WORLDS[-1]}"
    with nullcontext() if alone else group(folder, name, rank, world, last=last):
        yield True


def main(folder: Path, rank: int) -> None:
    """Saves by every world in both kinds, and by each of them loaded by every world."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in KINDS:
        for saved in WORLDS:
            at = folder / f"{kind}-{saved}"
            with ranks(folder, f"save-{kind}-{saved}", kind, rank, saved) as here:
                if here:
                    run, model, optimizer = begun(kind, saved, at, Counting())
                    run.resume()
                    model(torch.ones(2, WIDTH)).sum().backward()
                    optimizer.step()
                    run.step()
                    made = run.save()
                    found[f"{kind} {saved}"] = made.size_bytes
                    run.close()
            for world in WORLDS:
                name = f"{kind}-{saved}-{world}"
                with ranks(folder, name, kind, rank, world) as here:
                    if here:
                        calls = Counting()
                        run, _, _ = begun(kind, world, at, calls)
                        assert run.resume() is not None
                        found[f"{kind} {saved} {world}"] = calls.read_bytes
                        run.close()
    (folder / f"all-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[3]))
