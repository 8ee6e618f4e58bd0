"""Time over peak down to the least that any plan needs, and how long planning takes there.

For each model so many budgets in geometric steps from the untouched activation peak down to what no
plan can go below, each planned in a process of its own; then all of them in one. Predicted, beside
the bound that no plan of the same kind can beat.

    python -m experiments.tight [MODEL ...] [--quick] [--budgets N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import actckpt
from experiments.arguments import add_models
from experiments.figure import INK, MUTED, OURS, TORCH, bare_axes, blank_figure
from experiments.optimality import caught
from experiments.peers.models import EVERY, SEED, built
from experiments.progress import progress
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)

MODELS = ("gpt2_36", "llama_32", "vit_24", "t5_12", "resnet_101", "unet")
BUDGETS = 12

Row = dict[str, Any]


Step = tuple[actckpt.Graph, actckpt.Profile]


def step_of(name: str, quick: bool) -> Step:
    """The graph and the profile of a model's step."""
    torch.set_num_threads(1)
    subject = built(name, quick=quick)
    found = caught(subject.model, subject.batch, **subject.loss)
    return found.graph, found.profile


def shares_of(step: Step, count: int) -> list[float]:
    """Budgets as shares of the untouched peak, down to the certified floor."""
    graph, profile = step
    whole = actckpt.price(graph, profile, actckpt.Plan("none")).peak_bytes
    least = actckpt.lower_bound(graph, profile, 1).smallest_bytes
    return [float(share) for share in np.geomspace(1.0, least / whole, count)]


def row_of(name: str, step: Step, share: float) -> Row:
    """One budget."""
    torch.set_num_threads(1)
    return _row(name, step, share, bounded=True)


def rows_of(name: str, step: Step, shares: list[float]) -> list[Row]:
    """All budgets one after the other, with what they share."""
    torch.set_num_threads(1)
    with actckpt.kept_tables():
        return [_row(name, step, share, bounded=False) for share in shares]


def _row(name: str, step: Step, share: float, *, bounded: bool) -> Row:
    graph, profile = step
    whole = actckpt.price(graph, profile, actckpt.Plan("none"))
    budget = int(share * whole.peak_bytes)
    row: Row = {"model": name, "share": share, "ops": len(graph.ops), "budget_bytes": budget}
    before_bytes, begin_s = _most_bytes(), time.process_time()
    try:
        plan = actckpt.POLICIES["auto"](graph, profile, budget)
    except actckpt.BudgetError as error:
        row["smallest"] = (error.smallest_bytes or 0) / whole.peak_bytes
        plan = None
    row["plan_cpu_s"] = time.process_time() - begin_s
    row["plan_added_bytes"] = _most_bytes() - before_bytes
    if bounded:
        bound = actckpt.lower_bound(graph, profile, budget)
        if bound.possible:
            row["bound"], row["bound_by_operations"] = bound.overhead, bound.by_operations
    if plan is not None:
        price = actckpt.price(graph, profile, plan)
        row["overhead"] = price.time_s / whole.time_s - 1
        row["peak"] = price.peak_bytes / whole.peak_bytes
        row["by"] = "operations" if plan.bursts else "calls" if plan.regions else "nothing"
    return row


def _most_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


# ---- what is written


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _table(rows: list[Row]) -> str:
    columns = ["", "budget, %", "overhead, %", "bound, %", "by operations, %", "by", "plan, s",
               "with the others, s", "MB"]  # fmt: skip
    lines = []
    for row in rows:
        overhead = row.get("overhead")
        least = f"needs {100 * row.get('smallest', 0):.1f} %"
        lines.append([
            row["model"], _percent(row["share"]), least if overhead is None else _percent(overhead),
            _percent(row.get("bound")), _percent(row.get("bound_by_operations")),
            row.get("by", ""), f"{row['plan_cpu_s']:.1f}",
            f"{row['together_cpu_s']:.1f}" if "together_cpu_s" in row else "",
            f"{row['plan_added_bytes'] / 1e6:.0f}",
        ])  # fmt: skip
    return markdown_table(columns, lines)


def _times(rows: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == name]
        alone = [row["plan_cpu_s"] for row in of]
        together = [row["together_cpu_s"] for row in of if "together_cpu_s" in row]
        median_s = statistics.median(alone)
        lines.append([
            name, f"{sum(alone):.0f}", f"{sum(together):.0f}" if together else "",
            f"{median_s:.1f}", f"{max(alone):.1f}", f"{max(alone) / median_s:.1f}",
        ])  # fmt: skip
    columns = ["", "all budgets, s", "in one process, s", "median, s", "most, s", "most/median"]
    return markdown_table(columns, lines)


def draw(rows: list[Row]) -> Figure:
    """A panel for each model: overhead over peak, and the bound beside it."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = blank_figure(10.5, 3.2 * -(-len(names) // 3))
    panels = figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, panels, strict=False):
        bare_axes(axes)
        of = [row for row in rows if row["model"] == name]
        plans = [(100 * r["share"], 100 * r["overhead"]) for r in of if "overhead" in r]
        bounds = [(100 * r["share"], 100 * r["bound"]) for r in of if "bound" in r]
        axes.plot(*zip(*plans, strict=True), color=OURS, marker="o", markersize=3, label="plan")
        axes.plot(*zip(*bounds, strict=True), color=TORCH, linestyle="--", label="bound")
        axes.set_xscale("log")
        axes.set_title(name, fontsize=9, loc="left", color=INK)
        axes.set_xlabel("budget, % of the untouched activations", fontsize=8, color=MUTED)
        axes.set_ylabel("predicted overhead, %", fontsize=8, color=MUTED)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def write(folder: Path, rows: list[Row], quick: bool) -> None:
    """What there is so far: a run that is stopped loses one model."""
    about = circumstances(
        {"torch": torch.__version__, "actckpt": actckpt.__version__},
        seed=SEED,
        models="experiments/peers/deep.py and models.py" + (", --quick sizes" if quick else ""),
        time="processor time of planning from a graph and its profile; the bound is not in it",
    )
    write_json_lines("tight", about, rows, folder=folder)
    write_markdown(
        "tight",
        about,
        "# Down to the least memory",
        "Predicted overhead of `auto` at budgets in geometric steps from the untouched activation "
        "peak down to what no plan can go below, beside the bound that no plan can beat and that "
        "of plans by operations. Each budget is planned in a process of its own, and once more "
        "with all others in one.",
        _times(rows),
        _table(rows),
        "![overhead over peak](tight.png)",
        folder=folder,
    )
    draw(rows).savefig(folder / "tight.png")


def _read(folder: Path) -> list[Row]:
    """Rows of earlier runs: models that are named replace theirs."""
    path = folder / "tight.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tight", description=__doc__)
    add_models(parser, EVERY)
    parser.add_argument("--budgets", type=int, default=BUDGETS, metavar="N", help="at least 2")
    parser.add_argument(
        "--quick", action="store_true", help="small models, to try; writes to runs/tight"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = options.models or MODELS
    folder = Path("runs/tight") if options.quick else FOLDER
    context = multiprocessing.get_context("spawn")

    def fresh(function: Any, *arguments: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()

    rows = _read(folder)
    with progress(len(names), "models") as done:
        for name in names:
            step = fresh(step_of, name, options.quick)
            shares = fresh(shares_of, step, options.budgets)
            of = [fresh(row_of, name, step, share) for share in shares]
            for row, again in zip(of, fresh(rows_of, name, step, shares), strict=True):
                row["together_cpu_s"] = again["plan_cpu_s"]
            known = {row["model"]: [r for r in rows if r["model"] == row["model"]] for row in rows}
            known[name] = of
            rows = [row for model in EVERY for row in known.get(model, ())]
            write(folder, rows, options.quick)
            done(f"{name}: {sum(row['plan_cpu_s'] for row in of):.0f} s")


if __name__ == "__main__":
    main()
