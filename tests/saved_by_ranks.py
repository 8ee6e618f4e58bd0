"""Two processes whose sharded model torch.distributed.checkpoint saves in its formats, and another
model into which they load it.

``python -m tests.saved_by_ranks FOLDER`` leaves in it ``dcp`` and ``safetensors``; the whole
weights as ``expected.safetensors``; those that were loaded, as ``loaded-6.safetensors``; and in
``begun-*.txt`` what two runs said that were to begin with them.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

import actckpt

WORLD = 2


class Sharded(nn.Module):
    """Rows that two ranks cannot share evenly, fewer rows than ranks, frozen, tied, bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.rand(1), requires_grad=False)
        self.register_buffer("narrow", torch.rand(3, 2).bfloat16())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.head(self.body(self.embedding(x)))
        return y


def save(rank: int, folder: str) -> None:
    """One of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(3)
    model = Sharded()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.tensor([rank, 5])).sum().backward()
    optimizer.step()
    state = get_model_state_dict(model)
    full = StateDictOptions(full_state_dict=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=full)
    save_sharded(
        {"model": state, "optim": get_optimizer_state_dict(model, optimizer), "step": 5},
        checkpoint_id=f"{folder}/dcp",
    )
    sharded = HuggingFaceStorageWriter(f"{folder}/safetensors", save_distributed=True)
    # that writer refuses two names of one tensor
    save_sharded({k: v for k, v in state.items() if k != "head.weight"}, storage_writer=sharded)
    if rank == 0:
        save_file({k: v.clone() for k, v in whole.items()}, f"{folder}/expected.safetensors")
    dist.barrier()
    fresh = Sharded()
    fully_shard(fresh, mesh=mesh)
    report = actckpt.load_weights(fresh, f"{folder}/dcp")
    found = get_model_state_dict(fresh, options=full)
    loaded = {k: v.clone() for k, v in found.items() if isinstance(v, torch.Tensor)}
    if rank == 0:
        save_file(loaded, f"{folder}/loaded-{len(report.loaded)}.safetensors")
    begin(folder, rank, fresh)
    dist.barrier()
    dist.destroy_process_group()


def begin(folder: str, rank: int, model: nn.Module) -> None:
    """A run that cannot begin with weights which one rank has not, and one that can."""
    told = []
    with actckpt.Checkpointer(f"{folder}/run", model=model, every=None) as run:
        for missing in (f"{folder}/none", f"{folder}/dcp"):
            try:
                run.resume(start_from=f"{folder}/dcp" if rank == 0 else missing)
            except actckpt.CheckpointError as error:
                told.append(str(error))
            told.append("nothing" if run.started_from is None else run.started_from.kind)
    Path(f"{folder}/begun-{rank}.txt").write_text("\n".join(told), encoding="utf-8")


def main(folder: Path) -> None:
    """Both processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    start_processes(save, (str(folder),), WORLD, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
