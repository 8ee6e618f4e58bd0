"""The page of all tables, and the part of README that is one of them."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.measured import disk, peers, plans, steps
from experiments.measured.kept import kept

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measured.md"
README = ROOT / "README.md"
IN_README = re.compile(r"(<!-- measured: peers -->\n).*?(\n<!-- /measured -->)", re.DOTALL)


def page() -> str:
    """docs/measured.md."""
    return "\n\n".join([_HEAD, *_plans(), *_steps(), *_disk(), _REST]) + "\n"


def readme(text: str) -> str:
    """README with its table made anew."""
    return IN_README.sub(lambda found: found[1] + peers.means(kept("peers")) + found[2], text)


def _plans() -> list[str]:
    beside, gaps, predicted = kept("peers"), kept("optimality"), kept("prediction")
    absent, batches, times = kept("absent_devices"), kept("max_batch"), kept("plan_time")
    return [
        "## Beside what people use today",
        "Each peer ran at its own setting. Then our plan was given the peer's measured peak as its "
        "budget. Below 1, our step is faster; gradients are bitwise equal everywhere. *Mean* is "
        "the geometric mean over the models that the peer runs on.",
        peers.by_model(beside),
        peers.verdicts(beside),
        "Nine models of 4 to 58 layers, small enough for two cores; Mixtral in bfloat16, the rest "
        "in float32. Processor time of one thread, arms interleaved, medians. The arms of one "
        "model were run in groups, some before [a change](log.md) that made following cheaper. "
        "Rockmate does not import with these versions.",
        "![Time of each peer and ours at its peak](../experiments/results/peers_talk.png)",
        "![Peak against time for each model](../experiments/results/peers.png)",
        "Deep models, beside eager checkpointing alone: our step time at the peer's peak, and our "
        "peak where our step takes the peer's time.",
        peers.deep(beside),
        beside.source,
        "## How far from the optimum",
        "Predicted overhead above [the bound](how-it-works.md#the-bound) that no plan by "
        "operations can beat, in points of a step's time. In brackets: above the bound that no "
        "plan of either kind can beat.",
        plans.optimality(gaps),
        f"{plans.optima(gaps)} {plans.solving(gaps)}",
        plans.small_operations(gaps),
        gaps.source,
        "## Predicted and measured",
        "The same models, at the same shares of the untouched step's activations. *Off* is "
        "measured less predicted overhead, in points of the untouched step's time.",
        plans.prediction(predicted),
        plans.prediction_summary(predicted),
        "![Measured against predicted overhead](../experiments/results/prediction.png)",
        predicted.source,
        "## The largest batch",
        "`find_max_batch` was given the memory that the usual batch takes untouched. Steps of "
        "what it found were measured; so was one sample more, under the plan of least memory.",
        plans.max_batch(batches),
        batches.source,
        "## How long planning takes",
        "Of a GPT-2, by processor time; the last column counts it in training steps of the "
        "planned model.",
        plans.plan_time(times),
        times.source,
        "## Devices that are not here",
        "Plans for GPUs made on two cores without one, from data sheets. No weight is allocated. "
        "These are predictions; none was measured on its device.",
        plans.absent_budgets(absent),
        plans.absent_gaps(absent),
        plans.absent_planning(absent),
        "A BERT in half precision on an H100 is far from the bound: its host cannot keep up, and "
        "what our engine adds to the host's work shows.",
        absent.source,
    ]


def _steps() -> list[str]:
    chain, gpu, grid = kept("chain"), kept("gpu"), kept("grid")
    return [
        "## A chain of n blocks",
        "Blocks called from a loop over a `ModuleList`. Live activations at the peak of a step, "
        "in units of one block's output; time over the untouched chain's.",
        steps.chain(chain),
        "![Live activations against the length of the chain](../experiments/results/chain.png)",
        chain.source,
        "## On a GPU",
        "Planned and run there, once. What this run found has been mended since, and no GPU has "
        "been at hand since to say so with figures. Shares are of the untouched activations.",
        steps.gpu(gpu),
        "GPT-2's step drops its logits, which predictions do not assume. ResNet-152 went over: "
        "CUDA's allocator hands out blocks that it does not split. Without expandable segments, "
        "plans now aim 2 % below their budget. The `ReplayError`s were about a seed that "
        "attention's kernel leaves unwritten; it is no longer compared. GPT-2's gradients differ "
        "from one untouched run to the next; U-Net's were bitwise equal.",
        gpu.source,
        "## Every model x policy x budget",
        "Measured by the allocator, at six budgets, at the smallest that fits, and 2 % below it, "
        "for both scopes. None above its budget. Made before `auto` chose by operations.",
        steps.grid(grid),
        grid.source,
    ]


def _disk() -> list[str]:
    alone, large = kept("checkpoint_speed_256_alone"), kept("checkpoint_speed_2048_alone")
    together, journal = kept("checkpoint_speed_256"), kept("journal_cost")
    return [
        "## Saving and restoring",
        "In a process of its own, as ratios of medians.",
        disk.speeds([("255 MiB", alone), ("2 GiB", large)]),
        f"255 MiB: {alone.source}. 2 GiB: {large.source}",
        "Beside other libraries in one process, whose threads disturb what comes after them:",
        disk.beside(together),
        together.source,
        "## The journal",
        "What it costs to take down every step, beside the loop's own processor time.",
        disk.journal(journal),
        journal.source,
    ]


_HEAD = """\
<!-- made by `python -m experiments.measured` from experiments/results; not to be edited -->

# Measured

Every table is made from results kept in the repository, beside the command that made them, the
machine, and all versions. `python -m experiments.measured` makes this page anew."""

_REST = """\
## More

| question | command | figures |
| --- | --- | --- |
| every kind of training step and loop, with its test | `python -m experiments.kinds` | \
[kinds](../experiments/results/kinds.md) |
| trainers: bits, peak, killed and resumed, lines of code | `python -m experiments.trainers` | \
[trainers](../experiments/results/trainers.md) |
| optimizers of four libraries under a plan | `python -m experiments.optimizers` | \
[optimizers](../experiments/results/optimizers.md) |
| layouts of fake results beside real ones | `python -m experiments.layouts` | \
[layouts](../experiments/results/layouts.md) |
| checkpoints of four ranks beside torch.distributed.checkpoint | \
`python -W ignore -m experiments.ranks_speed` | \
[ranks_speed](../experiments/results/ranks_speed_1024.md) |
| what rank 0 of 256 needs to plan a save | `python -m experiments.ranks_scale cut replicas` | \
[ranks_scale](../experiments/results/ranks_scale.md) |
| what ranks read of a checkpoint, over its size | `python -m experiments.ranks_reading` | \
[ranks_reading](../experiments/results/ranks_reading.md) |
| this tree beside an earlier one | `python -m experiments.beside` | \
[beside](../experiments/results/beside.md) |
| kills, errors and power losses at every file-system call | `make faults` | \
[checkpoints](checkpoints.md#what-a-fault-can-do) |"""
