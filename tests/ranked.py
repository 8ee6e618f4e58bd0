"""Ranks that train one small model over gloo on this machine; several worlds in turn.

``python -m tests.ranked FOLDER SCENARIO RANK`` is one of `WORLDS`' largest; starting torch takes
longer than all that they do then.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

ROOT = Path(__file__).parent.parent
# where the store of the ranks is
PORT = "ACTCKPT_TEST_STORE"
# fifteen seconds where nothing else runs
LIMIT_S = 240
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

VOCABULARY, WIDTH = 37, 18


class Net(nn.Module):
    """Tied, frozen, uneven, fewer rows than ranks, 0-dimensional, other dtypes, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Sequential(nn.Linear(WIDTH, 66), nn.ReLU())
        self.down = nn.Linear(66, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.few = nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.randn(1))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("small", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("narrow", torch.randn(5).bfloat16(), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.drop(self.down(self.up(x))) + self.frozen(x)
        logits: torch.Tensor = self.head(x * self.scale + self.few.sum())
        return logits


def built(world: int) -> tuple[Net, torch.optim.Optimizer]:
    """The model cut over all ranks, or whole for 0, and AdamW."""
    torch.manual_seed(1)
    model = Net()
    if not world:
        return model, adamw(model)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


class Layers(nn.Module):
    """One after another, by name."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def meshed(kind: str, world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers and a norm, cut in one of the ways that there are."""
    torch.manual_seed(2)
    layers = {"up": nn.Linear(10, 66), "norm": nn.LayerNorm(66), "down": nn.Linear(66, 10)}
    model = Layers(**layers)
    half = world // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("outer", "inner"))
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh)
    elif kind in ("tp", "fsdp x tp"):
        over = init_device_mesh("cpu", (world,)) if kind == "tp" else mesh["inner"]
        parallelize_module(model, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "fsdp x tp":
            fully_shard(model, mesh=mesh["outer"])
    elif kind == "pipeline":
        first = dist.get_rank() < half
        here = ("up",) if first else ("norm", "down")
        model = Layers(**{name: layers[name] for name in here})
        fully_shard(model, mesh=mesh["inner"])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


class Seeing(nn.Module):
    """What sees other data on every rank, and keeps it: running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.drop(self.norm(self.first(x))))
        return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """With two groups."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": trained[::2]},
        {"params": trained[1::2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    counted: Callable[[], object] = lambda: None,
) -> None:
    """Steps of it, on data of this rank and step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in steps:
        seeded = torch.Generator().manual_seed(100 * step + rank)
        ids = torch.randint(0, VOCABULARY, (2, 5), generator=seeded)
        functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        counted()


def digests(*states: Any) -> dict[str, str]:
    """Of every whole tensor, by where it is; every rank has to ask."""
    found: dict[str, str] = {}

    def walk(x: Any, path: str) -> None:
        if isinstance(x, DTensor):
            walk(x.full_tensor(), path)
        elif isinstance(x, torch.Tensor):
            raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[path] = f"{x.dtype} {list(x.shape)} {hashlib.sha256(raw).hexdigest()}"
        elif isinstance(x, dict):
            for key, value in x.items():
                walk(value, f"{path}/{key}")
        elif isinstance(x, list):
            for number, value in enumerate(x):
                walk(value, f"{path}/{number}")
        else:
            found[path] = repr(x)

    for number, state in enumerate(states):
        walk(state, str(number))
    return found


@contextmanager
def group(folder: Path, name: str, rank: int, world: int, *, last: bool = False) -> Iterator[None]:
    """A process group of these ranks; who launched them has the store, as torchrun does.

    Args:
        last: it is left as it is, and the rank is to end by `os._exit` once it has said what it
            found. One in thousands did not come back from where torch takes gloo apart.
    """
    server = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", int(os.environ[PORT]), is_master=False, wait_for_workers=False
    )
    store = dist.PrefixStore(f"{folder.name}-{name}", server)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        yield
    finally:
        if not last:
            dist.destroy_process_group()


def launch(folder: Path, module: str, scenario: str, ranks: int) -> list[Any]:
    """Runs ``python -m module`` for every rank; what each wrote as its result."""
    server = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    running = []
    for rank in range(ranks):
        # a file: nobody reads a pipe while they run
        with (folder / f"stderr-{rank}").open("wb") as said:
            # one that does not end says where all its threads are
            options = ["-W", "error", "-X", "faulthandler"]
            command = [sys.executable, *options, "-m", module, str(folder), scenario]
            running.append(
                subprocess.Popen(
                    [*command, str(rank)],
                    cwd=ROOT,
                    env={**ENVIRONMENT, PORT: str(server.port)},
                    stderr=said,
                )
            )
    end = time.monotonic() + LIMIT_S
    while any(p.poll() is None for p in running) and time.monotonic() < end:
        if any(p.returncode for p in running):
            break  # the others would wait for it
        time.sleep(0.05)
    failed = [p for p in running if p.returncode]
    late = [rank for rank, p in enumerate(running) if p.poll() is None] if not failed else []
    for process in running:
        process.send_signal(signal.SIGABRT if late else signal.SIGKILL)
        process.wait()
    # one that failed may be so for what another, which is still there, has said
    texts = [(folder / f"stderr-{rank}").read_text("utf-8")[-8000:] for rank in range(ranks)]
    assert not failed, "\n\n".join(texts)
    assert not late, f"rank {late} had not ended after {LIMIT_S} s:\n" + "\n\n".join(texts)
    return [
        json.loads((folder / f"{scenario}-{rank}.json").read_text("utf-8")) for rank in range(ranks)
    ]
