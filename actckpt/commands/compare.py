"""``actckpt compare TARGET``: every policy at every budget, measured."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from actckpt.api import measure, optimize, report, revert
from actckpt.commands.compare_shown import draw, make_table, why_little_fits
from actckpt.commands.consoles import make_console
from actckpt.commands.parsers import add_command
from actckpt.commands.sweep import BUDGETS, Pair, Row, bounded, pair, percents_between, sweep
from actckpt.commands.target_options import (
    add_effort_option,
    add_target_options,
    describe,
    load,
    positive_int,
)
from actckpt.data.budget_error import BudgetError
from actckpt.data.plan import Plan
from actckpt.errors import PlanError
from actckpt.policies import POLICIES, SEARCHES
from actckpt.policies.solver.prepared import kept_tables
from actckpt.profiler.devices import find_device
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.strict_json import document, dumps
from actckpt.units import format_bytes, format_seconds
from actckpt.versions import versions


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "compare",
        about="measure every policy at every budget",
        description="Plan TARGET with every policy at every budget, measure real steps, print the "
        "table and write it with a plot. Budgets are for activations: what the step adds to "
        "parameters, gradients, optimizer state and batch (--scope step bounds everything).",
        example="actckpt compare gpt2 --set n_layer=4 --batch-size 4 --seq-len 128\n"
        "actckpt compare mypackage.training:build --policies auto,full --budgets 60,40",
    )
    add_target_options(parser, scope="activations")
    parser.add_argument(
        "--policies",
        type=_policies,
        default=",".join(name for name in POLICIES if name != "none"),
        metavar="P,P",
        help=f"of {', '.join(POLICIES)}",
    )
    parser.add_argument(
        "--budgets",
        type=_percents,
        metavar="N,N",
        help=f"in percent of the untouched peak (default: {BUDGETS} between the smallest plan and "
        "the untouched model)",
    )
    add_effort_option(parser)
    parser.add_argument(
        "--steps", type=positive_int, default=3, metavar="N", help="measured of each plan"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="where compare.json and compare.png are written",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if every measured peak is within its budget, else 1.

    Raises:
        ActckptError: no such target, or its step cannot be traced.
    """
    elsewhere = find_device(args.device)
    if elsewhere is not None:
        raise PlanError(
            f"compare measures real steps, and {elsewhere.name} is known by its data sheet only: "
            "use actckpt plan, which estimates"
        )
    console = make_console()
    model, batch, optimizer = load(args)
    twin, _, twin_optimizer = load(args)
    console.print(describe(args, model))

    def measured() -> Pair:
        # in turns, so that whatever else the machine does slows both
        rounds = [
            (
                measure(model, batch, optimizer=optimizer, steps=1),
                measure(twin, batch, optimizer=twin_optimizer, steps=1),
            )
            for _ in range(args.steps)
        ]
        return pair(rounds, args.scope)

    def planned(policy: str, budget_bytes: int) -> tuple[Plan, int | None]:
        optimize(
            model,
            budget_bytes / 1e9,
            batch=batch,
            optimizer=optimizer,
            policy=policy,
            effort=args.effort if policy in SEARCHES else None,
            scope=args.scope,
        )
        found = report(model)
        return found.plan, found.planned.predicted.bounded_bytes(args.scope)

    def smallest() -> int:
        for policy in ("auto", *args.policies):
            try:
                planned(policy, 1)
            except BudgetError as error:
                if error.smallest_bytes is not None:
                    return error.smallest_bytes
        return whole_bytes  # nothing can be recomputed

    untouched = measure(twin, batch, optimizer=twin_optimizer, steps=args.steps)
    whole_bytes = bounded(untouched, args.scope)
    console.print(
        f"untouched: {format_bytes(whole_bytes)}, {format_seconds(untouched.step_s)} a step\n"
    )
    rows = []
    with console.status("") as status, kept_tables():
        percents = args.budgets or percents_between(smallest(), whole_bytes)
        for row in sweep(
            args.policies,
            percents,
            whole_bytes,
            planned=planned,
            measured=measured,
            reverted=lambda: revert(model),
            progress=status.update,
        ):
            rows.append(row)
    console.print(make_table(rows))
    for line in why_little_fits(rows, whole_bytes, untouched.added_bytes, args.scope):
        console.print(line)
    _write(args, console, rows, untouched, whole_bytes)
    over = [r for r in rows if r.measured_bytes is not None and r.measured_bytes > r.budget_bytes]
    for row in over:
        console.print(f"{row.policy} at {row.percent:g} %: measured above its budget", style="red")
    return 1 if over else 0


def _write(
    args: argparse.Namespace,
    console: Console,
    rows: Sequence[Row],
    untouched: Measurement,
    whole_bytes: int,
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    data = document(
        "comparison",
        1,
        {
            "command": shlex.join(["actckpt", *sys.argv[1:]]),
            "target": args.target,
            "settings": dict(args.overrides),
            "batch_size": args.batch_size,
            "seq_len": args.seq_len,
            "dtype": args.dtype,
            "optimizer": args.optimizer,
            "scope": args.scope,
            "effort": args.effort,
            "device": args.device,
            "seed": args.seed,
            "versions": versions(),
            "untouched": untouched.to_json(),
            "rows": [asdict(row) for row in rows],
        },
    )
    (args.out / "compare.json").write_text(dumps(data), encoding="utf-8")
    draw(rows, whole_bytes, args.target).savefig(args.out / "compare.png")
    console.print(f"\nwrote {args.out / 'compare.json'} and {args.out / 'compare.png'}")


def _policies(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no policy {', '.join(map(repr, unknown))}; there are {', '.join(POLICIES)}"
        )
    return names


def _percents(text: str) -> list[float]:
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 < p < float("inf") for p in percents):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of percentages above 0, such as 90,60,30"
        )
    return percents
