"""What the journal beside the checkpoints costs a loop, in processor time.

Two runs of one model take turns, one with a journal and one without (`on_difference=None`). Only
the public API is timed: `step`, and the iteration of `steps`, over batches that exist already.

    python -m experiments.journal_cost
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.arguments import add_models
from experiments.progress import progress
from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from experiments.timing import keep_heap, ratio

SEED = 0
BATCHES = 16
# the journal looks at what it costs after so many steps
WARMUP = 130

Row = dict[str, Any]


def perceptron() -> tuple[nn.Module, list[Any]]:
    """Three layers, 32 images of 28 x 28."""
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    model.append(nn.Linear(256, 10))
    return model, [torch.randn(32, 784) for _ in range(BATCHES)]


def gpt2(width: int, layers: int, tokens: int) -> tuple[nn.Module, list[Any]]:
    """GPT-2's shape, 4 texts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_embd=width, n_layer=layers, n_head=4)
    model: nn.Module = GPT2LMHeadModel(config).train()
    return model, [torch.randint(2048, (4, tokens)) for _ in range(BATCHES)]


# name -> the model with its batches, steps before the first round, rounds, steps of each
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, list[Any]]], int, int, int]] = {
    "perceptron": (perceptron, WARMUP, 81, 128),
    "small GPT-2": (lambda: gpt2(128, 2, 64), WARMUP, 25, 16),
    "middle GPT-2": (lambda: gpt2(256, 4, 128), 5, 9, 4),
}


@dataclass(slots=True)
class Spent:
    """Processor seconds of some steps.

    Args:
        loop_s: of the whole process.
        calls_s: of this thread in the run's calls.
        beside_s: of other threads.
    """

    loop_s: float = 0.0
    calls_s: float = 0.0
    beside_s: float = 0.0


class Arm:
    """A run that can be continued for some steps."""

    def __init__(self, run: actckpt.Checkpointer, model: nn.Module, batches: list[Any]) -> None:
        self._run = run
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters())
        run.save()
        self._steps: Iterator[tuple[int, Any]] = run.steps(batches, epochs=None)

    def train(self, steps: int) -> Spent:
        """Makes so many steps."""
        spent = Spent()
        process, thread = time.process_time(), time.thread_time()
        for _ in range(steps):
            begin = time.thread_time()
            _, batch = next(self._steps)
            spent.calls_s += time.thread_time() - begin
            output = self._loss(batch)
            output.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            metrics = {"loss": output.item()}
            begin = time.thread_time()
            self._run.step(metrics)
            spent.calls_s += time.thread_time() - begin
        spent.loop_s = time.process_time() - process
        spent.beside_s = spent.loop_s - (time.thread_time() - thread)
        return spent

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        if batch.dtype == torch.int64:
            loss: torch.Tensor = self._model(batch, labels=batch).loss
        else:
            loss = self._model(batch).square().mean()
        return loss


def row_of(name: str) -> Row:
    """What one model's loop spends with a journal and without."""
    make, warmup, rounds, steps = MODELS[name]
    found: dict[str, list[Spent]] = {"with": [], "without": []}
    with ExitStack() as stack:
        arms = {}
        folders = {}
        for kind in found:
            torch.manual_seed(SEED)
            model, batches = make()
            folders[kind] = stack.enter_context(tempfile.TemporaryDirectory())
            how = "warn" if kind == "with" else None
            run = actckpt.Checkpointer(folders[kind], model=model, every=None, on_difference=how)
            arms[kind] = Arm(stack.enter_context(run), model, batches)
            arms[kind].train(warmup)
        before_bytes = _journal_bytes(folders["with"])
        for number in range(rounds):
            for kind in sorted(arms, reverse=bool(number % 2)):
                found[kind].append(arms[kind].train(steps))
        written_bytes = _journal_bytes(folders["with"]) - before_bytes
    pairs = list(zip(found["with"], found["without"], strict=True))
    journal_s = statistics.median(a.calls_s + a.beside_s - b.calls_s - b.beside_s for a, b in pairs)
    over = ratio([a.loop_s for a, _ in pairs], [b.loop_s for _, b in pairs])
    loop_s = statistics.median(a.loop_s for a, _ in pairs)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": rounds,
        "loop_s": loop_s / steps,
        "journal_s": journal_s / steps,
        "share": journal_s / loop_s,
        "over_without": [over.median, over.low, over.high],
        "bytes_per_step": written_bytes / (steps * rounds),
    }


def _journal_bytes(folder: str) -> int:
    time.sleep(0.1)  # until what is under way is written
    return (Path(folder) / "journal.jsonl").stat().st_size


def table(rows: list[Row]) -> str:
    columns = ["", "one step", "the journal, each step", "share", "loop, with over without",
               "written, each step"]  # fmt: skip
    return markdown_table(
        columns,
        [
            [
                f"{row['model']}, {row['parameters'] / 1e6:.1f} M parameters",
                f"{row['loop_s'] * 1e3:.1f} ms",
                f"{row['journal_s'] * 1e6:.0f} µs",
                f"{row['share']:.2%}",
                "{:.3f} ({:.3f}–{:.3f})".format(*row["over_without"]),
                f"{row['bytes_per_step']:.0f} bytes",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.journal_cost", description=__doc__)
    add_models(parser, MODELS)
    names = parser.parse_args().models or list(MODELS)
    torch.set_num_threads(1)
    keep_heap()
    rows: list[Row] = []
    with progress(len(names), "journal") as done:
        for name in names:
            rows.append(row_of(name))
            done(f"{name}: {rows[-1]['share']:.2%} of {rows[-1]['loop_s'] * 1e3:.1f} ms")
    model = nn.Linear(1, 1)
    actckpt.optimize(model, None, batch=torch.randn(1, 1), policy="full")
    about = circumstances(
        actckpt.report(model).versions,
        seed=SEED,
        time="processor time, medians over 81, 25 and 9 rounds that alternate between the run with "
        "a journal and the one without, the two shorter ones after 130 steps of each; one thread "
        "of torch's. The journal: what the calls of the run take more than without, and other "
        "threads",
    )
    write_json_lines("journal_cost", about, rows)
    write_markdown(
        "journal_cost",
        about,
        "# What the journal costs",
        "A loop with AdamW and a loss given to `step`, with the journal beside its checkpoints and "
        "without. Where steps are so short that all of them would take more than 0.7 %, "
        "every second, fourth, ... is taken down: so in the first rows.",
        table(rows),
    )


if __name__ == "__main__":
    main()
