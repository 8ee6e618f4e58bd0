"""Does every optimizer keep its bits and a budget? Those of torch and of three libraries, in turn.

    python -m experiments.optimizers [--only adam,muon] [--minutes 4] [--fresh]

Each trains the same small model, untouched and planned, for some steps, with a budget of nine
tenths of the untouched step's peak. Asked are: the same bits after every step; the peak of a
further step, by the allocator, within the budget; what of the optimizer was planned for; and that
nothing ends in an error, the optimizer given to `optimize` or learned from the loop. Where an
optimizer does not train the untouched model in the usual loop, other ways of stepping it are
tried; one that works in none, or gives other bits from run to run, says nothing and is listed.

Results go to ``results/optimizers.jsonl``, a line per optimizer as soon as it is known; those that
are there already are not run again (``--fresh`` forgets them). ``results/optimizers.md`` is the
table. Optimizers of libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import nn

import actckpt
from experiments.optimizer_trial import LEFT_OUT, Row, run
from experiments.optimizer_zoo import library, zoo
from experiments.progress import progress
from experiments.results import FOLDER, circumstances, markdown_table, write_markdown

RESULTS = FOLDER / "optimizers.jsonl"


def violations(row: Row) -> list[str]:
    """What must not be."""
    if row["outcome"] == "no trial":
        return []
    if row["outcome"] == "error":
        return [row["reason"]]
    found = []
    if not row["bitwise"]:
        found.append("other bits")
    if row["peak_bytes"] > row["budget_bytes"] and row["planned"] != LEFT_OUT:
        found.append(f"peak is {row['peak_bytes'] / row['budget_bytes']:.3f} of the budget")
    if row.get("given"):
        found.append(f"given: {row['given']}")
    return found


def read() -> list[Row]:
    """The optimizers of earlier runs."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "about" not in line]


def table(rows: Sequence[Row]) -> str:
    """One line per optimizer that was tried."""
    lines = [
        (
            row["name"],
            row["way"],
            row.get("planned", "-"),
            f"{row['budget_bytes'] / row['untouched_bytes']:.3f}",
            f"{row['peak_bytes'] / row['budget_bytes']:.3f}" if "peak_bytes" in row else "-",
            "yes" if row.get("bitwise") else "NO",
            "; ".join(violations(row)) or "-",
        )
        for row in rows
        if row["outcome"] != "no trial"
    ]
    columns = ("optimizer", "stepped", "its step was", "budget / untouched", "peak / budget",
               "same bits", "violations")  # fmt: skip
    return markdown_table(columns, lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """The counts."""
    tried = [row for row in rows if row["outcome"] != "no trial"]
    bad = [row for row in tried if violations(row)]
    how = [row.get("planned") for row in tried]
    kept = [r for r in tried if "peak_bytes" in r and r["planned"] != LEFT_OUT]
    peaks = [r["peak_bytes"] / r["budget_bytes"] for r in kept]
    raised = sum("least_bytes" in row for row in tried)
    return [
        f"Optimizers: {len(rows)}, {len(tried)} tried, {len(rows) - len(tried)} train nothing here "
        "by themselves, or no two runs alike.",
        f"Violations: {len(bad)}.",
        f"Traced: {how.count('traced')}; measured at a real step: {how.count('measured')}; left "
        f"out, and said: {how.count('left out, and said')}.",
        f"Worst peak / budget, but for those: {max(peaks, default=0):.4f}. Of {raised} the step "
        "itself needs more than nine tenths: `BudgetError` says how much, and that is the budget "
        "here.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing was violated, else 1."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    kinds = zoo()
    rows = [] if args.fresh else read()
    done = {row["name"] for row in rows}
    todo = [n for n in kinds if n not in done and any(w in n for w in args.only)]
    libraries = ("pytorch_optimizer", "schedulefree", "bitsandbytes")
    versions = {n: metadata.version(n) for n in libraries if library(n)}
    about = circumstances(_versions() | versions, seed=0, threads_per_process=1)
    if not rows:
        RESULTS.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")
    with progress(len(todo), "optimizers") as tick:
        for name in todo:
            if time.perf_counter() - begin > 60 * args.minutes:
                break
            row = run(name, kinds[name])
            rows.append(row)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            found = "; ".join(violations(row)) or row.get("reason") or row.get("planned", "")
            tick(f"{name}: {found}")
    order = {name: n for n, name in enumerate(kinds)}
    rows.sort(key=lambda row: order.get(row["name"], len(order)))
    lines = summary(rows)
    apart = [f"- {row['name']}: {row['reason']}" for row in rows if row["outcome"] == "no trial"]
    write_markdown(
        "optimizers", about, "# Optimizers", "\n".join(f"- {x}" for x in lines), table(rows),
        "## Not tried", "\n".join(apart) or "None.",
    )  # fmt: skip
    print("\n".join(lines))
    return any(violations(row) for row in rows)


def _versions() -> dict[str, str]:
    net = nn.Linear(1, 1)
    actckpt.optimize(net, None, batch=torch.ones(1, 1), policy="none")
    return actckpt.report(net).versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.optimizers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=("",),
        metavar="W,W",
        help="those with one of these in their names",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="begins none after that long")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
