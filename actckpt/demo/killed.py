"""The tight training once more, in processes of its own: killed in the middle, and resumed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

import actckpt
from actckpt.demo.model import GPT, GPTConfig, next_byte_loss
from actckpt.demo.text import draw_batch, standard_library_text

EVERY_STEPS = 4
BATCH_SIZE = 16
LEARNING_RATE = 1e-3


class Batches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The batch of every step, as the trainings of the first half draw them."""

    def __init__(self, steps: int, seed: int, context: int) -> None:
        self.text = standard_library_text()
        self.steps, self.seed, self.context = steps, seed, context

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_batch(self.text, BATCH_SIZE, self.context, self.seed + 1 + step)


@dataclass(frozen=True, slots=True)
class Killed:
    """What became of the killed training.

    Attributes:
        failures: what was not as promised.
        kill_after: steps that the first process made.
        resumed_at: step that the second one went on from.
        losses: of every step, those after the checkpoint by the second process.
    """

    failures: tuple[str, ...]
    kill_after: int
    resumed_at: int
    losses: tuple[float, ...]


def kill_and_resume(
    folder: Path, expected: list[float], *, budget_gb: float, seed: int, console: Console
) -> Killed:
    """The losses of a training that kills itself, against those of one that does not.

    Args:
        folder: for the checkpoints; what an earlier demo left there goes.
        expected: loss of every step.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = len(expected)
    kill_after = _kill_after(steps)
    log = folder / "losses.jsonl"
    asked = [sys.executable, "-m", "actckpt.demo.killed", str(folder / "run"), str(log)]
    asked += [str(steps), str(seed), repr(budget_gb)]
    failures = []
    first = subprocess.run([*asked, str(kill_after)], check=False)
    if first.returncode != -signal.SIGKILL:
        failures.append(f"the first process ended with {first.returncode}, not by SIGKILL")
    console.print(f"kill -9 after step {kill_after}; a new process:")
    second = subprocess.run([*asked, "0"], check=False)
    if second.returncode != 0:
        failures.append(f"the second process ended with {second.returncode}")
    losses: dict[int, list[float]] = {}
    made = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for entry in made:
        losses.setdefault(entry["step"], []).append(entry["loss"])
    wrong = [
        step + 1
        for step, loss in enumerate(expected)
        if set(losses.get(step, [float("nan")])) != {loss}
    ]
    if wrong:
        failures.append(f"killed and resumed: losses differ at steps {wrong[:5]}")
    again = [e["step"] for e in made[kill_after:]]
    resumed_at = again[0] if again else 0
    if resumed_at > kill_after or (resumed_at == 0 and kill_after > EVERY_STEPS):
        failures.append(f"the second process began at step {resumed_at}")
    if not failures:
        console.print(
            f"resumed at step {resumed_at}, {len(made)} steps in two processes: "
            f"losses of all {steps} equal to the last bit"
        )
    failures += _damage(folder, console)
    return Killed(
        tuple(failures), kill_after, resumed_at, tuple(losses[s][-1] for s in sorted(losses))
    )


def _kill_after(steps: int) -> int:
    """Steps of the first process: about two thirds."""
    return max(1, 2 * steps // 3 - 1)


def _damage(folder: Path, console: Console) -> list[str]:
    """One bit of a copy of the newest checkpoint turned, and what ``verify`` says of both."""
    newest = max((folder / "run").glob("step-*"))
    copy = folder / "damaged" / newest.name
    shutil.copytree(newest, copy)
    largest = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    failures = []
    for path, status in ((newest, 0), (copy, 1)):
        said = subprocess.run(
            [sys.executable, "-m", "actckpt.cli", "checkpoint", "verify", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        console.print(f"$ actckpt checkpoint verify {path}\n{(said.stdout + said.stderr).strip()}")
        if said.returncode != status:
            failures.append(f"verify of {path} ended with {said.returncode}, not {status}")
    return failures


def train(directory: str, log: Path, steps: int, seed: int, budget_gb: float, kill: int) -> None:
    """Train to the end, or until the process kills itself after so many steps (0: never)."""
    torch.manual_seed(seed)
    config = GPTConfig()
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    data = Batches(steps, seed, config.context)
    loader = DataLoader(data, batch_size=None)
    ids, target = data[0]
    actckpt.optimize(
        model, budget_gb, batch=ids, loss_fn=next_byte_loss, target=target, optimizer=optimizer
    )
    run = actckpt.Checkpointer(
        directory,
        model=model,
        optimizer=optimizer,
        loader=loader,
        every=min(EVERY_STEPS, _kill_after(steps)),
    )
    with run, log.open("a", encoding="utf-8") as losses:
        run.resume()
        for step, (ids, target) in run.steps(loader):
            torch.manual_seed(seed + 1 + step)
            optimizer.zero_grad()
            loss = next_byte_loss(model(ids), target)
            loss.backward()
            optimizer.step()
            losses.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
            losses.flush()
            run.step(metrics={"loss": loss})
            if step + 1 == kill:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("log", type=Path)
    for name, kind in (("steps", int), ("seed", int), ("budget_gb", float), ("kill", int)):
        parser.add_argument(name, type=kind)
    train(**vars(parser.parse_args()))
