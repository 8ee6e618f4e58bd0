"""A small training that ckpt-chaos kills: ``python -m experiments.checkpoint_chaos.train OUT``.

With RANK and WORLD_SIZE in the environment it is one process of several. Says which step it goes on
from, and writes a digest of the weights that it comes to.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import actckpt

STEPS = 12


def _nothing(fd: Any) -> None:
    """In the place of fsync."""


def main() -> None:
    """Trains to the end, from wherever it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--at-once", action="store_true", help="no thread beside, and no journal")
    parser.add_argument("--forgetful", action="store_true", help="without fsync: a broken build")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.forgetful:
        os.fsync = _nothing
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1))
    called = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data = TensorDataset(torch.randn(64, 8))
    sampler: Any = DistributedSampler(data) if world > 1 else None
    loader = DataLoader(data, 4, shuffle=sampler is None, sampler=sampler)
    torch.manual_seed(rank)
    run = actckpt.Checkpointer(
        args.out / "run",
        model=called,
        optimizer=optimizer,
        loader=loader,
        every=4,
        keep_last=None,
        background=not args.at_once,
        on_difference=None if args.at_once else "warn",
    )
    resumed = run.resume()
    sys.stdout.write(f"resumed from step {0 if resumed is None else resumed.step}\n")
    sys.stdout.flush()
    with run:
        for _, (x,) in run.steps(epochs=None, total_steps=STEPS):
            called(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    if not rank:
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        (args.out / "final.txt").write_text(digest.hexdigest(), encoding="utf-8")
    if world > 1:
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
