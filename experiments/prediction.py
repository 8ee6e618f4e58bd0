"""Does a planned step take as long, and as much memory, as predicted? `auto`, nine models.

Every model is planned for shares of its untouched activations; all its plans and the untouched
model, twice, take turns in one process. Models that are named are measured and replace their rows.

    python -m experiments.prediction [MODEL ...] [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.arguments import add_models
from experiments.figure import INK, MUTED, OURS, UNTOUCHED, bare_axes, blank_figure
from experiments.peers.models import MODELS, SEED, built
from experiments.peers.ours import Planner
from experiments.peers.trial import tried
from experiments.progress import progress
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)
from experiments.timing import interleaved, ratio

SHARES = (0.75, 0.5, 0.35, 0.25)
ROUNDS = 15
POINTS = 2.0  # of step time, as near as predictions are to be

Row = dict[str, Any]


def rows_of(name: str, quick: bool, rounds: int) -> tuple[dict[str, str], list[Row]]:
    """The versions, and a row for every budget that can be met."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    subject = built(name, quick=quick)
    untouched = copy.deepcopy(subject.model)
    whole, first = tried(subject, untouched, untouched, None)
    again = copy.deepcopy(subject.model)
    arms = {"untouched": whole, "again": tried(subject, again, again, first)[0]}
    planner = Planner(subject, 2 * whole.whole_bytes)
    plans = {share: planner.at(int(share * whole.peak_bytes)) for share in SHARES}
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    for plan in plans.values():
        if plan is not None:
            arms[plan.name] = tried(subject, plan.model, plan.model, first)[0]
            versions = plan.report.versions
    times = interleaved({n: arm.run for n, arm in arms.items()}, rounds=rounds, seed=SEED)
    spread = ratio(times["again"], times["untouched"])
    rows = []
    for share, plan in plans.items():
        row: Row = {"model": name, "quick": quick, "rounds": rounds, "share": share}
        row["untouched_s"] = statistics.median(times["untouched"])
        row["again"] = {"median": spread.median, "low": spread.low, "high": spread.high}
        if plan is not None:
            arm, measured = arms[plan.name], ratio(times[plan.name], times["untouched"])
            row |= {
                "by": "operations" if plan.report.plan.bursts else "calls",
                "predicted": plan.predicted,
                "measured": measured.median,
                "low": measured.low,
                "high": measured.high,
                "predicted_untouched_s": plan.report.baseline.predicted.step_s,
                "used": arm.peak_bytes / (share * whole.peak_bytes),
                "gradients": arm.gradients,
                "buffers": arm.buffers,
            }
        rows.append(row)
    return versions, rows


def summary(rows: list[Row]) -> str:
    """How near predictions are, in a paragraph."""
    planned = [row for row in rows if "measured" in row]
    off = {id(row): 100 * (row["measured"] - row["predicted"]) for row in planned}
    worst = max(planned, key=lambda row: abs(off[id(row)]))
    near = sum(abs(points) <= POINTS for points in off.values())
    steps = [row["predicted_untouched_s"] / row["untouched_s"] for row in planned]
    exact = sum(row["gradients"] == 0 and row["buffers"] == 0 for row in planned)
    return (
        f"Measured less predicted overhead, in points of the untouched step's time: median "
        f"{statistics.median(off.values()):+.1f}, median of the size "
        f"{statistics.median(map(abs, off.values())):.1f}, {near} of {len(planned)} within "
        f"{POINTS:.0f}, worst {off[id(worst)]:+.1f} ({worst['model']}, {100 * worst['share']:.0f} "
        f"%). The untouched step itself: predicted over measured {min(steps):.2f} to "
        f"{max(steps):.2f}, median {statistics.median(steps):.2f}. Largest measured peak over its "
        f"budget: {max(row['used'] for row in planned):.4f}. Gradients and buffers bitwise equal "
        f"in {exact} of {len(planned)}."
    )


def table(rows: list[Row]) -> str:
    def line(row: Row) -> list[str]:
        begin = [row["model"], f"{100 * row['share']:.0f}"]
        if "measured" not in row:
            return [*begin, "none fits", *[""] * 6]
        low, high = (100 * (row[key] - 1) for key in ("low", "high"))
        off = 100 * (row["measured"] - row["predicted"])
        noise = 100 * max(row["again"]["high"] - 1, 1 - row["again"]["low"])
        return [
            *begin,
            f"{100 * (row['predicted'] - 1):.1f}",
            f"{100 * (row['measured'] - 1):.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{off:+.1f}",
            f"±{noise:.1f}",
            f"{100 * row['used']:.1f}",
            row["by"],
        ]

    columns = ["", "budget, %", "predicted, %", "measured, %", "quartiles", "off, points", "A/A",
               "used, %", "by"]  # fmt: skip
    return markdown_table(columns, [line(row) for row in rows])


def draw(rows: list[Row]) -> Figure:
    """Measured against predicted overhead."""
    figure = blank_figure(5.2, 4.6)
    axes = figure.subplots()
    bare_axes(axes)
    planned = [row for row in rows if "measured" in row]
    x = [100 * (row["predicted"] - 1) for row in planned]
    y = [100 * (row["measured"] - 1) for row in planned]
    end = max(*x, *y) * 1.05
    axes.fill_between([0, end], [-POINTS, end - POINTS], [POINTS, end + POINTS], color=MUTED,
                      alpha=0.12, linewidth=0, label=f"within {POINTS:.0f} points")  # fmt: skip
    axes.plot([0, end], [0, end], color=UNTOUCHED, linewidth=0.8)
    for row, px, py in zip(planned, x, y, strict=True):
        low, high = (100 * (row[key] - 1) for key in ("low", "high"))
        axes.plot([px, px], [low, high], color=OURS, linewidth=1.0, alpha=0.5)
        axes.plot(px, py, marker="o", color=OURS, markersize=4, linestyle="none")
        if abs(py - px) > POINTS:
            # towards the side on which there are no other points
            side = "right" if py > px else "left"
            axes.annotate(f"{row['model']} {100 * row['share']:.0f} %", (px, py), fontsize=6,
                          color=MUTED, ha=side, xytext=(-4 if py > px else 4, 2),
                          textcoords="offset points")  # fmt: skip
    axes.set_xlabel("predicted overhead, %", fontsize=9, color=MUTED)
    axes.set_ylabel("measured overhead, % (quartiles)", fontsize=9, color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    return figure


def write(folder: Path, versions: dict[str, str], rows: list[Row]) -> None:
    rounds = ", ".join(f"{m} {n}" for m, n in {r["model"]: r["rounds"] for r in rows}.items())
    about = circumstances(
        versions,
        seed=SEED,
        models="those of experiments.peers",
        budgets="shares of the untouched step's activation peak, scope='activations'",
        time="processor time of one thread, the heap kept, arms interleaved, medians and quartiles "
        "of the ratios round by round; A/A is the untouched model against itself",
        rounds=rounds,
    )
    write_json_lines("prediction", about, rows, folder=folder)
    write_markdown(
        "prediction", about, "# Predicted and measured", summary(rows), table(rows),
        "![measured against predicted overhead](prediction.png)", folder=folder,
    )  # fmt: skip
    draw(rows).savefig(folder / "prediction.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.prediction", description=__doc__)
    add_models(parser, MODELS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds, at least 2")
    parser.add_argument(
        "--quick", action="store_true", help="small models, to try; writes to runs/prediction"
    )
    options = parser.parse_args()
    names = options.models or list(MODELS)
    folder = Path("runs/prediction") if options.quick else FOLDER
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the allocation log's own lines
    path = folder / "prediction.jsonl"
    rows: list[Row] = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    context = multiprocessing.get_context("spawn")
    with progress(len(names), "models") as done:
        for name in names:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                task = pool.submit(rows_of, name, options.quick, options.rounds)
                versions, found = task.result()
            rows = [row for row in rows if row["model"] != name] + found
            rows.sort(key=lambda row: (list(MODELS).index(row["model"]), -row["share"]))
            write(folder, versions, rows)
            off = (100 * (r["measured"] - r["predicted"]) for r in found if "measured" in r)
            done(f"{name}: {', '.join(f'{points:+.1f}' for points in off)}")


if __name__ == "__main__":
    main()
