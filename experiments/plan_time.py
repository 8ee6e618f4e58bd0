"""How long planning takes, and how many training steps that is.

GPT-2 shapes with 12 and 48 layers. Only the public API is timed: `actckpt.trace` by itself, then
`actckpt.optimize` around a policy that notes when it is asked and when it answers.

    python -m experiments.plan_time
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.progress import progress
from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from experiments.timing import interleaved, ratio

SEED = 0
WIDTH = 384
TOKENS = 256
VOCAB = 8192
LAYERS = (12, 48)
POLICIES = ("full", "auto")
REPEATS = 2
ROUNDS = 2

Row = dict[str, Any]


@dataclass(slots=True)
class Watched:
    """A policy that remembers when it was asked and when it answered."""

    name: str
    spans_s: list[tuple[float, float]] = field(default_factory=list)

    def __call__(
        self, graph: actckpt.Graph, profile: actckpt.Profile, budget_bytes: int | None
    ) -> actckpt.Plan:
        begin = time.process_time()
        plan = actckpt.POLICIES[self.name](graph, profile, budget_bytes)
        self.spans_s.append((begin, time.process_time()))
        return plan


@dataclass(frozen=True, slots=True)
class Times:
    """Processor seconds of one planning.

    Args:
        before_s: until the policy is first asked: the trace and the profile.
        solve_s: in the policy.
        rest_s: dry runs, their prices, and the report.
    """

    before_s: float
    solve_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        return self.before_s + self.solve_s + self.rest_s


def gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=layers, n_head=8)
    model: nn.Module = GPT2LMHeadModel(config)
    return model.train()


def timed_plan(
    model: nn.Module, batch: dict[str, torch.Tensor], policy: str, budget_bytes: int | None
) -> Times:
    """Plans and leaves the plan in force."""
    watched = Watched(policy)
    begin = time.process_time()
    actckpt.optimize(
        model,
        None if budget_bytes is None else budget_bytes / 1e9,
        batch=batch,
        policy=watched,
    )
    total = time.process_time() - begin
    before = watched.spans_s[0][0] - begin
    solve = sum(end - start for start, end in watched.spans_s)
    return Times(before, solve, total - before - solve)


def rows_of(layers: int) -> tuple[dict[str, str], list[Row]]:
    """The versions, and a row for every policy at one depth."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = gpt2(layers)
    untouched = copy.deepcopy(model)
    ids = torch.randint(VOCAB, (1, TOKENS))
    batch = {"input_ids": ids, "labels": ids.clone()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACTCKPT_CACHE"] = folder
        graph = actckpt.trace(model, batch)
        cold = timed_plan(model, batch, "full", None)
        report = actckpt.report(model)
        half_bytes = (
            report.baseline.predicted.peak_bytes + report.planned.predicted.peak_bytes
        ) // 2
        rows = []
        for policy in POLICIES:
            budget_bytes = half_bytes if policy == "auto" else None
            plans = [timed_plan(model, batch, policy, budget_bytes) for _ in range(REPEATS)]
            steps = interleaved(
                {"planned": step(model, batch), "untouched": step(untouched, batch)},
                rounds=ROUNDS,
                warmup=1,
                seed=SEED,
            )
            total_s = min(times.total_s for times in plans)
            step_s = statistics.median(steps["planned"])
            rows.append(
                {
                    "layers": layers,
                    "policy": policy,
                    "budget_bytes": budget_bytes,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "ops": len(graph.ops),
                    "distinct_ops": len(set(graph.signatures)),
                    "before_s": min(t.before_s for t in plans),
                    "before_cold_s": cold.before_s,
                    "solve_s": min(t.solve_s for t in plans),
                    "dry_run_s": min(t.rest_s for t in plans),
                    "total_s": total_s,
                    "totals_s": [times.total_s for times in plans],
                    "untouched_step_s": statistics.median(steps["untouched"]),
                    "planned_step_s": step_s,
                    "over_untouched": ratio(steps["planned"], steps["untouched"]).median,
                    "steps": total_s / step_s,
                }
            )
        return actckpt.report(model).versions, rows


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def table(rows: list[Row]) -> str:
    columns = [
        "", "operations (distinct)", "trace and profile", "solve", "dry run", "total", "one step",
        "total in steps", "trace and profile, empty cache",
    ]  # fmt: skip
    return markdown_table(
        columns,
        [
            [
                f"{row['layers']} layers, {row['policy']}",
                f"{row['ops']} ({row['distinct_ops']})",
                *(f"{row[key]:.2f} s" for key in ("before_s", "solve_s", "dry_run_s", "total_s")),
                f"{row['planned_step_s']:.1f} s",
                f"{row['steps']:.2f}",
                f"{row['before_cold_s']:.1f} s",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.plan_time", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    depths = parser.parse_args().layers
    rows: list[Row] = []
    versions: dict[str, str] = {}
    fresh = multiprocessing.get_context("spawn")
    with progress(len(depths), "plan time") as done, fresh.Pool(1, maxtasksperchild=1) as pool:
        for environment, found in pool.imap(rows_of, depths):
            versions |= environment
            rows.extend(found)
            for row in found[:-1]:
                print(line(row))
            done(line(found[-1]))
    about = circumstances(
        versions,
        seed=SEED,
        repeats=REPEATS,
        model=f"GPT-2, width {WIDTH}, 8 heads, vocabulary {VOCAB}, 1 x {TOKENS} tokens, float32, "
        "the model's own loss, no optimizer",
        time="processor time of one thread: of planning the least, of steps the median; a step is "
        "forward, loss and backward under the plan. Trace and profile: until the policy is "
        "first asked. Dry run: all that comes after the policy, the report included",
    )
    write_json_lines("plan_time", about, rows)
    write_markdown(
        "plan_time",
        about,
        "# Plan time",
        "`actckpt.optimize` on GPT-2 shapes, part by part, and in training steps of the planned "
        "model on the same thread. full: without a budget; auto: with a budget halfway between the "
        "peaks of the untouched step and of full. The empty cache is a first run on this "
        "machine: every distinct operation is timed once.",
        table(rows),
    )


def line(row: Row) -> str:
    return (
        f"{row['layers']} layers, {row['policy']}: {row['total_s']:.1f} s, "
        f"{row['steps']:.2f} steps of {row['planned_step_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
