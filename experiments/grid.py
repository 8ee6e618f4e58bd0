"""Is a measured peak ever above its budget? Every model x policy x scope x budget, on real steps.

    python -m experiments.grid [--models gpt2,t5] [--policies auto] [--scopes step] [--budgets 50]

Budgets are percents of the untouched step's measured peak; with ``--scopes activations`` of what
the step adds. A cell fits, as measured, or raises `BudgetError` with the smallest budget that can
be met; asking for that smallest must fit, and for 2 % less must raise. Every policy but ``auto``
has one plan whatever the budget, so what it does at its smallest budget and 2 % below decides its
other cells (``--every`` asks for each of them all the same).

Results go to ``results/grid.jsonl``, a line per cell as soon as it is known; cells that are there
already are not measured again (``--fresh`` forgets them). ``results/grid.md`` is the table.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.arguments import several
from experiments.progress import progress
from experiments.results import FOLDER, circumstances, markdown_table, write_markdown
from tests.predictions import Agreement, agreement, autocast
from tests.suite import CASES, adamw, trainable

PERCENTS = (90.0, 75.0, 60.0, 50.0, 40.0, 30.0)
SCOPES = ("step", "activations")
SMALLEST, BELOW = "smallest", "2 % below"
RESULTS = FOLDER / "grid.jsonl"
# how far predictions may be off: (at least, at most) of what was measured, or dry-run
DRY_RUN, LIVE, PRICE = (0.995, 1.02), (0.999, 1.001), (0.98, 1.02)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """The cells of one model under one policy."""

    model: str
    policy: str
    scopes: tuple[str, ...]
    percents: tuple[float, ...]
    every: bool


class Subject:
    """One model of the suite with a step of it, planned and measured as a user would."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        self.model = self.case.build()
        self.batch = self.case.batch()
        self.optimizer = (self.case.optimizer or adamw)(trainable(self.model))
        self.accumulate = self.case.micro_steps > 1
        if self.case.clip:
            self.optimizer.register_step_pre_hook(self._clip)
        self.measured: dict[actckpt.Plan, actckpt.Measurement] = {}
        if self.accumulate:  # resident gradients are a condition that only a plan can ask for
            self.plan("none", None, "step")
        self.untouched = self._measure()
        actckpt.revert(self.model)

    def _clip(self, *_: Any) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def plan(self, policy: str, budget_bytes: int | None, scope: str) -> actckpt.Report:
        """The report of a plan now in force."""
        with autocast(self.case):
            actckpt.optimize(
                self.model,
                None if budget_bytes is None else budget_bytes / 1e9,
                batch=self.batch,
                loss_fn=self.case.loss_fn,
                optimizer=self.optimizer,
                accumulate=self.accumulate,
                policy=policy,
                scope=scope,
            )
        return actckpt.report(self.model)

    def steps(self, plan: actckpt.Plan) -> actckpt.Measurement:
        """What real steps under the plan in force need, measured once per plan."""
        if plan not in self.measured:
            self.measured[plan] = self._measure()
        return self.measured[plan]

    def _measure(self) -> actckpt.Measurement:
        torch.manual_seed(0)
        with autocast(self.case):
            return actckpt.measure(
                self.model,
                self.batch,
                loss_fn=self.case.loss_fn,
                optimizer=self.optimizer,
                steps=1,
            )


def run(task: Task) -> list[Row]:
    """Every cell of a task."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return list(_cells(task, Subject(task.model)))


def _cells(task: Task, subject: Subject) -> Iterator[Row]:
    for scope in task.scopes:
        whole = _bounded(subject.untouched, scope)
        budgets: dict[float | str, int] = {p: round(whole * p / 100) for p in task.percents}
        least = _smallest(subject, task.policy, scope)
        budgets |= {SMALLEST: least, BELOW: math.floor(least * 0.98)}
        asked: dict[float | str, Row] = {}
        order: tuple[float | str, ...] = (SMALLEST, BELOW, *task.percents)
        for at in order:
            budget = budgets[at]
            row: Row = {
                "model": task.model,
                "policy": task.policy,
                "scope": scope,
                "at": at,
                "budget_bytes": budget,
                "untouched_bytes": whole,
            }
            known = None
            if task.policy != "auto" and not task.every:
                known = _known(budget, budgets, asked)
            if known is None:
                row |= _ask(subject, task.policy, scope, budget)
                asked[at] = row
            else:
                row |= {k: v for k, v in known.items() if k not in row} | {"asked": False}
            row["violations"] = _violations(row, least, subject.untouched)
            yield row


def _smallest(subject: Subject, policy: str, scope: str) -> int:
    """The smallest budget that can be met, as told to whoever asks for one byte."""
    try:
        subject.plan(policy, 1, scope)
    except actckpt.BudgetError as error:
        if error.smallest_bytes is not None:
            return error.smallest_bytes
        raise
    raise AssertionError(f"{subject.case.name}, {policy}: a plan for one byte")


def _known(
    budget: int, budgets: dict[float | str, int], asked: dict[float | str, Row]
) -> Row | None:
    """The cell that decides one of a policy that has one plan whatever the budget."""
    for at, row in asked.items():
        if row["outcome"] == "fits" and budget >= budgets[at]:
            return row
        if row["outcome"] == "budget error" and budget <= budgets[at]:
            return row
    return None


def _ask(subject: Subject, policy: str, scope: str, budget_bytes: int) -> Row:
    """What comes of asking for a budget: a measured plan, or why there is none."""
    begin = time.perf_counter()
    try:
        report = subject.plan(policy, budget_bytes, scope)
    except actckpt.BudgetError as error:
        return {"outcome": "budget error", "smallest_bytes": error.smallest_bytes}
    except Exception as error:  # a cell of the table, not the end of the others
        return {"outcome": "error", "error": f"{type(error).__name__}: {error}"[:400]}
    plan_s = time.perf_counter() - begin
    try:
        measured = subject.steps(report.plan)
    except Exception as error:
        return {"outcome": "error", "error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        actckpt.revert(subject.model)
    found = agreement(subject.case.name, report.plan)
    return {
        "outcome": "fits",
        "regions": len(list(report.plan.walk())),
        "plan_s": round(plan_s, 3),
        "predicted_bytes": report.planned.predicted.bounded_bytes(scope),
        "measured_bytes": _bounded(measured, scope),
        "step_s": measured.step_s,
        "untouched_step_s": subject.untouched.step_s,
        "loss": measured.loss,
        **_ratios(report, measured, found),
    }


def _bounded(measured: actckpt.Measurement, scope: str) -> int:
    return measured.peak_bytes if scope == "step" else measured.added_bytes


def _ratios(report: actckpt.Report, measured: actckpt.Measurement, found: Agreement) -> Row:
    predicted = report.planned.predicted
    assert predicted.added_bytes is not None
    return {
        "dry_over_measured": [
            predicted.peak_bytes / measured.peak_bytes,
            predicted.added_bytes / measured.added_bytes,
        ],
        "price_over_dry": [
            found.price_peak_bytes / predicted.peak_bytes,
            found.price_added_bytes / predicted.added_bytes,
        ],
        "dry_over_live": found.dry_live_bytes / found.real_live_bytes,
    }


def _violations(row: Row, least: int, untouched: actckpt.Measurement) -> list[str]:
    """What must never be seen in a cell."""
    outcome, budget = row["outcome"], row["budget_bytes"]
    if outcome == "error":
        return [row["error"]]
    found = []
    if outcome == "budget error":
        if budget >= least:
            found.append(f"raised though {least} bytes can be met")
        if row["smallest_bytes"] != least:
            found.append(f"smallest {row['smallest_bytes']} here, {least} elsewhere")
        return found
    if row["measured_bytes"] > budget:
        found.append(f"measured {row['measured_bytes']} bytes")
    if row["at"] == BELOW:
        found.append(f"fits though {least} was said to be the smallest")
    if row["loss"] != untouched.loss:
        found.append("another loss")
    return found


# ---- the table


def deviations(row: Row) -> list[str]:
    """Predictions of a cell that are further off than they may be."""
    if row["outcome"] != "fits":
        return []
    found = []
    for name, key, (low, high) in (
        ("dry run / measured", "dry_over_measured", DRY_RUN),
        ("price / dry run", "price_over_dry", PRICE),
        ("dry run / live storages", "dry_over_live", LIVE),
    ):
        ratios = row[key] if isinstance(row[key], list) else [row[key]]
        found += [f"{name} {r:.4f}" for r in ratios if not low <= r <= high]
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per model and policy."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["policy"]].append(row)
    lines = []
    for (model, policy), group in groups.items():
        fits = [r for r in group if r["outcome"] == "fits"]
        ratios = [r["measured_bytes"] / r["budget_bytes"] for r in fits]
        smallest = [r for r in group if r["at"] == SMALLEST]
        shares = {r["scope"]: r["budget_bytes"] / r["untouched_bytes"] for r in smallest}
        slower = [r["step_s"] / r["untouched_step_s"] for r in fits]
        lines.append(
            [
                model,
                policy,
                str(len(fits)),
                str(len(group) - len(fits)),
                f"{max(ratios):.3f}" if ratios else "",
                f"{min(ratios):.3f}" if ratios else "",
                *(f"{shares[s]:.1%}" if s in shares else "" for s in SCOPES),
                f"{max(slower):.2f}" if slower else "",
                str(sum(bool(r["violations"]) for r in group)),
                str(sum(bool(deviations(r)) for r in group)),
            ]
        )
    columns = (
        "model", "policy", "fit", "raise", "worst measured / budget", "best", "smallest, step",
        "smallest, activations", "slowest / untouched", "violations", "predictions off",
    )  # fmt: skip
    return markdown_table(columns, lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """Sentences: how many cells, what was violated, and the worst predictions."""
    fits = [r for r in rows if r["outcome"] == "fits"]
    bad = [r for r in rows if r["violations"]]
    asked = sum(r.get("asked", True) for r in rows)
    lines = [
        f"Cells: {len(rows)} ({asked} asked, the others decided by these), {len(fits)} fit, "
        f"{len(rows) - len(fits)} raise.",
        f"Violations: {len(bad)}.",
    ]
    lines += [f"  {_name(r)}: {'; '.join(r['violations'])}" for r in bad]
    if not fits:
        return lines
    over = max(fits, key=lambda r: r["measured_bytes"] / r["budget_bytes"])
    worst = over["measured_bytes"] / over["budget_bytes"]
    lines.append(f"Worst measured / budget: {worst:.4f} ({_name(over)}).")
    for name, key, i in (
        ("dry run / measured peak", "dry_over_measured", 0),
        ("dry run / measured activations", "dry_over_measured", 1),
        ("price / dry run, peak", "price_over_dry", 0),
        ("price / dry run, activations", "price_over_dry", 1),
        ("dry run / real, live storages", "dry_over_live", None),
    ):
        values = [(r[key] if i is None else r[key][i], r) for r in fits]
        low, high = min(values, key=lambda v: v[0]), max(values, key=lambda v: v[0])
        lines.append(
            f"Worst {name}: {low[0]:.4f} ({_name(low[1])}) to {high[0]:.4f} ({_name(high[1])})."
        )
    return lines


def _name(row: Row) -> str:
    return f"{row['model']}, {row['policy']}, {row['scope']}, {_at(row['at'])}"


def _at(at: float | str) -> str:
    return at if isinstance(at, str) else f"{at:g} %"


# ---- the run


def read(path: Any = RESULTS) -> list[Row]:
    """The cells of earlier runs."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "about" not in line]


def missing(tasks: Iterable[Task], rows: Sequence[Row]) -> list[Task]:
    """The tasks that still have a cell to measure."""
    done = {(r["model"], r["policy"], r["scope"], r["at"]) for r in rows}
    return [
        t
        for t in tasks
        if any(
            (t.model, t.policy, scope, at) not in done
            for scope in t.scopes
            for at in (SMALLEST, BELOW, *t.percents)
        )
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing was violated, else 1."""
    args = _parser().parse_args(argv)
    begin = time.perf_counter()
    tasks = [
        Task(model, policy, args.scopes, args.budgets, args.every)
        for model in args.models
        for policy in args.policies
    ]
    rows = [] if args.fresh else read()
    todo = missing(tasks, rows)
    FOLDER.mkdir(exist_ok=True)
    about = circumstances(_versions(), seed=0, threads_per_process=1)
    if not rows:
        RESULTS.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs) as pool, progress(len(todo), "model x policy") as tick:
        for found in pool.imap_unordered(run, todo):
            with RESULTS.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            done = {(r["model"], r["policy"], r["scope"], r["at"]) for r in found}
            rows = [r for r in rows if (r["model"], r["policy"], r["scope"], r["at"]) not in done]
            rows += found
            tick(_line(found))
    order = {name: i for i, name in enumerate((*CASES, *actckpt.POLICIES))}
    rows.sort(key=lambda r: (order[r["model"]], order[r["policy"]]))
    lines = summary(rows)
    about["seconds"] = round(time.perf_counter() - begin)
    write_markdown(
        "grid", about, "# The grid", "\n".join(f"- {x.strip()}" for x in lines), table(rows)
    )
    print("\n".join(lines))
    return any(r["violations"] for r in rows)


def _line(rows: Sequence[Row]) -> str:
    fits = [r["measured_bytes"] / r["budget_bytes"] for r in rows if r["outcome"] == "fits"]
    worst = f", worst measured / budget {max(fits):.3f}" if fits else ""
    found = [f"{_name(r)}: {v}" for r in rows for v in r["violations"]]
    off = sorted({d for r in rows for d in deviations(r)})
    return (
        f"{rows[0]['model']:16} {rows[0]['policy']:10} {len(fits)} of {len(rows)} fit{worst}"
        + "".join(f"\n    VIOLATION {v}" for v in found)
        + (f"\n    off: {', '.join(off)}" if off else "")
    )


def _versions() -> dict[str, str]:
    model = nn.Linear(1, 1)
    actckpt.optimize(model, None, batch=torch.ones(1, 1), policy="none")
    return actckpt.report(model).versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.grid", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def percents(text: str) -> tuple[float, ...]:
        return tuple(float(p) for p in text.split(","))

    parser.add_argument(
        "--models", type=several("model", CASES), default=tuple(CASES), metavar="M,M"
    )
    parser.add_argument(
        "--policies",
        type=several("policy", actckpt.POLICIES),
        default=tuple(actckpt.POLICIES),
        metavar="P,P",
    )
    parser.add_argument("--scopes", type=several("scope", SCOPES), default=SCOPES, metavar="S,S")
    parser.add_argument("--budgets", type=percents, default=PERCENTS, metavar="N,N")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), metavar="N")
    parser.add_argument("--every", action="store_true", help="ask for every cell")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
