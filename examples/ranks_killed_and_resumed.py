"""Two ranks share a model (FSDP2), one is killed, and torchrun starts both again.

    python examples/ranks_killed_and_resumed.py

Shows: the ranks go on from the checkpoint that both wrote, to the very losses of an undisturbed
run; then one process, without torchrun, takes the same weights.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import actckpt


def model_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 1))


def train(folder: Path, die_at: int) -> None:
    """Three epochs on every rank; the second kills itself after step ``die_at``, once."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = model_of()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)  # each has another half of the examples, and drops others
    data = torch.randn(32, 16)
    loader = DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), 8, shuffle=True)
    with actckpt.Checkpointer(  # not in the background: these steps would be over before a save
        folder / "run", model=model, optimizer=optimizer, loader=loader, every=5, background=False
    ) as run:
        resumed = run.resume()
        print(f"  rank {rank}: {resumed or 'begun'}", flush=True)
        with (folder / f"losses-{rank}.txt").open("a") as lines:
            for step, (inputs, target) in run.steps(loader, epochs=3):
                loss = nn.functional.mse_loss(model(inputs), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
                print(step, float(loss.detach()).hex(), file=lines, flush=True)
                if rank == 1 and step == die_at > 0 and not resumed:
                    os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def losses_of(folder: Path, die_at: int) -> list[dict[str, str]]:
    """Of each rank, step -> loss."""
    folder.mkdir()
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, __file__]
    # without DISABLE_SHARE the ranks that torchrun starts again dial those that are dead
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, folder, str(die_at)], env=env, check=True, stderr=subprocess.DEVNULL)
    texts = [(folder / f"losses-{rank}.txt").read_text() for rank in range(2)]
    return [dict(line.split(" ", 1) for line in text.splitlines()) for text in texts]


def main(die_at: int = 8) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, killed = (losses_of(Path(folder, str(step)), step) for step in (0, die_at))
        print(f"{len(first[0])} steps of 2 ranks, losses equal to the last bit: {killed == first}")
        print(actckpt.load_weights(model_of(), Path(folder, str(die_at), "run")))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) == 3 else main()
