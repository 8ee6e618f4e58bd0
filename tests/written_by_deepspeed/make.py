"""Has DeepSpeed train a tiny model on two processes and save it: what lies in this folder.

``python -m tests.written_by_deepspeed.make FOLDER``, with deepspeed 0.19.8, which nothing else here
needs, importable (``pip install --no-deps --target SOMEWHERE deepspeed einops hjson msgpack ninja
py-cpuinfo``, and SOMEWHERE in PYTHONPATH). Beside each folder lies what DeepSpeed's own functions
say of the live engine: the weights and moments whole, by name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.spawn import spawn

TAG = "global_step3"
STAGES = (1, 2, 3)
WORLD = 2


class Net(nn.Module):
    """Tied, frozen and uneven parameters, in two groups, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("count", torch.tensor(3.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.head(self.norm(self.body(self.embedding(x))))
        return y


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """What is decayed and what is not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(rank: int, stage: int, folder: str) -> None:
    """One of the processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29990 + stage))
    os.environ.update(LOCAL_SIZE=str(WORLD), DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(1)
    model = Net()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups(model), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    for step in range(3):
        loss = engine(torch.tensor([step, rank])).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
    if stage < 3:
        # what links moments to parameters is done at the first step, before there are any
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    engine.save_checkpoint(folder, tag=TAG)
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole[f"fp32/{name}"] = safe_get_full_fp32_param(parameter).cpu().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                full = safe_get_full_optimizer_state(parameter, key)
                whole[f"{key}/{name}"] = full.cpu().clone()
    if rank == 0:
        save_file(whole, f"{folder}.expected.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def universal(folder: Path, stage: int) -> None:
    """The folder of a stage, converted by DeepSpeed's own tool."""
    import subprocess

    subprocess.run(
        [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
            "--input_folder", str(folder / f"zero{stage}" / TAG),
            "--output_folder", str(folder / f"universal{stage}" / TAG),
            "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state",
        ],
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


def main(folder: Path) -> None:
    """Every folder."""
    for stage in STAGES:
        spawn(train, (stage, str(folder / f"zero{stage}")), nprocs=WORLD)
    for stage in STAGES[1:]:
        universal(folder, stage)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
