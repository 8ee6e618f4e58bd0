"""A training that is killed in the middle, and goes on as if it had not been.

    python examples/killed_and_resumed.py

Shows: the same script, started again, makes the very losses that an undisturbed run makes, dropout
and shuffling included; and the steps that were made twice are compared.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import actckpt


def train(directory: Path, log: Path, die_at: int) -> None:
    """Three epochs; ``log`` gets a line for each step. Kills itself after step ``die_at``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(64, 16)
    loader = DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), 8, shuffle=True)
    with actckpt.Checkpointer(
        directory, model=model, optimizer=optimizer, loader=loader, every=5
    ) as run:
        resumed = run.resume()
        print(f"  resumed: {resumed}" if resumed else "  begun")
        with log.open("a") as lines:
            for step, (inputs, target) in run.steps(loader, epochs=3):
                loss = nn.functional.mse_loss(model(inputs), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(metrics={"loss": loss})
                print(step, float(loss).hex(), file=lines, flush=True)
                if step == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        print(f"  compared with the run before: {run.verified}")


def losses_of(folder: Path, *deaths: int) -> dict[str, str]:
    """step -> loss, of a run that is killed at ``deaths`` and started again each time."""
    log = folder / "losses.txt"
    for die_at in (*deaths, -1):
        command = [sys.executable, __file__, str(folder / "run"), str(log), str(die_at)]
        status = subprocess.run(command).returncode
        print(f"  ended with {status}")
    lines = (line.partition(" ") for line in log.read_text().splitlines())
    return {step: loss for step, _, loss in lines}


def main(die_at: int = 13) -> None:
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        for each in (undisturbed, killed):
            each.mkdir()
        print("undisturbed:")
        expected = losses_of(undisturbed)
        print(f"killed after step {die_at}:")
        found = losses_of(killed, die_at)
    same = found == expected
    print(f"{len(found)} steps, losses equal to the last bit: {same}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
