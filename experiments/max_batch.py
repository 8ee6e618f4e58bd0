"""Does `find_max_batch`'s answer train, and does one more not fit? Three models, both measured.

The budget is what the model's usual batch takes untouched. A step of the answer is measured under
its plan, and one of one sample more under the plan of the least memory.

    python -m experiments.max_batch [MODEL ...] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import actckpt
from experiments.arguments import add_models
from experiments.peers.models import MODELS, SEED, built
from experiments.peers.subject import Subject, cross_entropy
from experiments.progress import progress
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)

SUBJECTS = ("gpt2", "vit", "resnet50")
Row = dict[str, Any]


def resized(x: Any, size: int) -> Any:
    """A batch of ``size`` samples, those of ``x`` over and over."""
    if isinstance(x, dict):
        return {key: resized(value, size) for key, value in x.items()}
    return x.repeat(-(-size // len(x)), *[1] * (x.dim() - 1))[:size]


def loss_of(subject: Subject, size: int) -> dict[str, Any]:
    """The loss of a batch of ``size`` samples, as `actckpt.optimize` takes it."""
    if subject.target is None:
        return {}
    return {"loss_fn": cross_entropy, "target": resized(subject.target, size)}


def peak(subject: Subject, size: int) -> int:
    """Measured, of one step of the model as it is."""
    found = actckpt.measure(
        subject.model, resized(subject.batch, size), steps=1, **loss_of(subject, size)
    )
    return found.peak_bytes


def planned(subject: Subject, size: int, budget_bytes: int) -> int:
    """The measured peak of a step under a plan for this budget."""
    loss = loss_of(subject, size)
    batch = resized(subject.batch, size)
    actckpt.optimize(subject.model, budget_bytes / 1e9, batch=batch, **loss)
    try:
        return peak(subject, size)
    finally:
        actckpt.revert(subject.model)


def least(subject: Subject, size: int, budget_bytes: int) -> int:
    """The measured peak of a step under the plan of the least memory; more than the budget."""
    try:
        return planned(subject, size, budget_bytes)
    except actckpt.BudgetError as error:
        if error.smallest_bytes is None or error.smallest_bytes <= budget_bytes:
            raise
        return least(subject, size, error.smallest_bytes)


def row_of(name: str, quick: bool) -> Row:
    subject = built(name, quick=quick)
    usual = len(next(iter(subject.batch.values())) if isinstance(subject.batch, dict)
                else subject.batch)  # fmt: skip
    budget = peak(subject, usual)
    made: dict[str, Any] = {}
    if subject.target is not None:
        target = subject.target
        made = {"loss_fn": cross_entropy, "make_target": lambda n: resized(target, n)}
    begin = time.perf_counter()
    found = actckpt.find_max_batch(
        subject.model, budget / 1e9, lambda n: resized(subject.batch, n), **made
    )
    row: Row = {"model": name, "usual": usual, "budget_bytes": budget}
    row["search_s"] = time.perf_counter() - begin
    row |= {"largest": found.largest, "fastest": found.fastest, "tried": len(found.tried)}
    row["peak_bytes"] = planned(subject, found.largest, budget)
    row["fastest_bytes"] = planned(subject, found.fastest, budget)
    row["more_bytes"] = least(subject, found.largest + 1, budget)
    return row


def table(rows: list[Row]) -> str:
    columns = ["", "usual", "budget, MB", "largest", "peak, %", "fastest", "peak, %",
               "one more, %", "sizes tried", "search, s"]  # fmt: skip

    def line(row: Row) -> list[str]:
        def share(key: str) -> str:
            return f"{100 * row[key] / row['budget_bytes']:.1f}"

        return [
            row["model"], str(row["usual"]), f"{row['budget_bytes'] / 1e6:.0f}",
            str(row["largest"]), share("peak_bytes"), str(row["fastest"]), share("fastest_bytes"),
            share("more_bytes"), str(row["tried"]), f"{row['search_s']:.0f}",
        ]  # fmt: skip

    return markdown_table(columns, [line(row) for row in rows])


def write(folder: Path, versions: dict[str, str], rows: list[Row]) -> None:
    about = circumstances(
        versions,
        seed=SEED,
        models="those of experiments.peers",
        budget="the measured peak of the untouched model at its usual batch",
        peaks="measured, in % of the budget; one more: under the plan of the least memory of one "
        "sample more than the largest",
    )
    write_json_lines("max_batch", about, rows, folder=folder)
    write_markdown("max_batch", about, "# The largest batch", table(rows), folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.max_batch", description=__doc__)
    add_models(parser, MODELS)
    parser.add_argument(
        "--quick", action="store_true", help="small models, to try; writes to runs/max_batch"
    )
    options = parser.parse_args()
    names = options.models or list(SUBJECTS)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the allocation log's own lines
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = Path("runs/max_batch") if options.quick else FOLDER
    rows: list[Row] = []
    with progress(len(names), "models") as done:
        for name in names:
            row = row_of(name, options.quick)
            rows.append(row)
            more = 100 * row["more_bytes"] / row["budget_bytes"]
            done(f"{name}: {row['largest']} fit, one more takes {more:.1f} % of the budget")
    versions = {"actckpt": actckpt.__version__, "torch": str(torch.__version__)}
    write(folder, versions, rows)


if __name__ == "__main__":
    main()
