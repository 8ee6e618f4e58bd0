"""``actckpt compare TARGET``: every policy at every budget, measured."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from actckpt.api import measure, optimize, report, revert
from actckpt.commands.target_options import add_target_options, describe, load, positive_int
from actckpt.errors import BudgetError, PlanError
from actckpt.plan import Plan
from actckpt.policies import POLICIES
from actckpt.profiler.devices import find_device
from actckpt.reporting.figure import INK, MUTED, bare_axes, blank_figure
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.strict_json import document, dumps
from actckpt.units import format_bytes, format_percent, format_seconds
from actckpt.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "auto": "#c0392b",
    "full": "#2a78b5",
    "sqrt": "#58b09c",
    "log": "#8b7bb8",
    "selective": "#f2b45c",
    "none": "#4a5568",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one budget.

    Args:
        percent: the budget as a share of the untouched peak.
        smallest_bytes: where the budget cannot be met: the smallest that can.
        predicted_bytes: what a budget of that scope is compared with, like ``measured_bytes``.
        ratio: planned over untouched step time, the median over rounds of one step of each.
    """

    policy: str
    percent: float
    budget_bytes: int
    fits: bool
    smallest_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    step_s: float | None = None
    untouched_step_s: float | None = None
    ratio: float | None = None
    regions: int | None = None
    plan_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A plan beside the untouched model."""

    planned_bytes: int
    step_s: float
    untouched_step_s: float
    ratio: float


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = commands.add_parser(
        "compare",
        help="measure every policy at every budget",
        description="Plan TARGET with every policy at every budget, measure real steps, print the "
        "table and write it with a plot.",
    )
    add_target_options(parser)
    parser.add_argument(
        "--policies",
        type=_policies,
        default=[name for name in POLICIES if name != "none"],
        metavar="P,P",
        help=f"of {', '.join(POLICIES)} (default: all but none)",
    )
    parser.add_argument(
        "--budgets",
        type=_percents,
        default=[90.0, 75.0, 60.0, 50.0, 40.0, 30.0],
        metavar="N,N",
        help="in percent of the untouched peak (default: 90,75,60,50,40,30)",
    )
    parser.add_argument("--steps", type=positive_int, default=3, metavar="N", help="measured each")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER")
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
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
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
            scope=args.scope,
        )
        found = report(model)
        return found.plan, found.planned.predicted.bounded_bytes(args.scope)

    untouched = measure(twin, batch, optimizer=twin_optimizer, steps=args.steps)
    whole_bytes = bounded(untouched, args.scope)
    console.print(
        f"untouched: {format_bytes(whole_bytes)}, {format_seconds(untouched.step_s)} a step\n"
    )
    rows = []
    with console.status("") as status:
        for row in sweep(
            args.policies,
            args.budgets,
            whole_bytes,
            planned=planned,
            measured=measured,
            reverted=lambda: revert(model),
            progress=status.update,
        ):
            rows.append(row)
    console.print(make_table(rows))
    _write(args, console, rows, untouched, whole_bytes)
    over = [r for r in rows if r.measured_bytes is not None and r.measured_bytes > r.budget_bytes]
    for row in over:
        console.print(f"{row.policy} at {row.percent:g} %: measured above its budget", style="red")
    return 1 if over else 0


def bounded(measurement: Measurement, scope: str) -> int:
    """What a budget of that scope is compared with."""
    return measurement.added_bytes if scope == "activations" else measurement.peak_bytes


def pair(rounds: Sequence[tuple[Measurement, Measurement]], scope: str) -> Pair:
    """What rounds of one (planned, untouched) step each amount to: the highest peak, medians."""
    return Pair(
        planned_bytes=max(bounded(planned, scope) for planned, _ in rounds),
        step_s=median(planned.step_s for planned, _ in rounds),
        untouched_step_s=median(untouched.step_s for _, untouched in rounds),
        ratio=median(planned.step_s / untouched.step_s for planned, untouched in rounds),
    )


def sweep(
    policies: Sequence[str],
    percents: Sequence[float],
    whole_bytes: int,
    *,
    planned: Callable[[str, int], tuple[Plan, int | None]],
    measured: Callable[[], Pair],
    reverted: Callable[[], Any],
    progress: Callable[[str], Any],
) -> Iterator[Row]:
    """A row for every policy at every budget, each plan measured once, beside the untouched step.

    Args:
        percents: budgets in percent of ``whole_bytes``.
        planned: plans the model and returns the plan and the predicted bytes.
        measured: measures the model as it is, and an untouched one.
        reverted: makes the model untouched.
    """
    for policy in policies:
        known: dict[Plan, Pair] = {}
        for percent in percents:
            budget_bytes = int(whole_bytes * percent / 100)
            row = Row(policy, percent, budget_bytes, fits=False)
            progress(f"{policy} at {percent:g} %")
            reverted()
            start = time.perf_counter()
            try:
                plan, predicted_bytes = planned(policy, budget_bytes)
            except BudgetError as error:
                yield replace(row, smallest_bytes=error.smallest_bytes)
                continue
            plan_s = time.perf_counter() - start
            if plan not in known:
                known[plan] = measured()
            found = known[plan]
            yield replace(
                row,
                fits=True,
                predicted_bytes=predicted_bytes,
                measured_bytes=found.planned_bytes,
                step_s=found.step_s,
                untouched_step_s=found.untouched_step_s,
                ratio=found.ratio,
                regions=len(list(plan.walk())) + len(list(plan.walk_bursts())),
                plan_s=plan_s,
            )
    reverted()


def make_table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table, a section for each policy."""
    table = Table(box=SIMPLE, pad_edge=False, header_style="bold")
    table.add_column("policy")
    for name in ("budget", "", "predicted", "measured", "of budget", "step", "time", "regions"):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        if i and rows[i - 1].policy != row.policy:
            table.add_section()
        head = (row.policy, f"{row.percent:g} %", format_bytes(row.budget_bytes))
        if not row.fits:
            smallest = row.smallest_bytes
            reached = "" if smallest is None else f" (smallest {format_bytes(smallest)})"
            table.add_row(*head, "", f"does not fit{reached}", style="dim")
            continue
        assert row.measured_bytes is not None
        assert row.ratio is not None
        used = row.measured_bytes / row.budget_bytes
        table.add_row(
            *head,
            "" if row.predicted_bytes is None else format_bytes(row.predicted_bytes),
            format_bytes(row.measured_bytes),
            f"{100 * used:.1f} %",
            "" if row.step_s is None else format_seconds(row.step_s),
            format_percent(row.ratio - 1),
            str(row.regions),
            style="red" if used > 1 else None,
        )
    return table


def draw(rows: Sequence[Row], whole_bytes: int, title: str) -> Figure:
    """Measured peak against time ratio, one line for each policy.

    Raises:
        ReportError: matplotlib is not installed.
    """
    figure = blank_figure(7.2, 4.6)
    axes = figure.subplots()
    bare_axes(axes)
    for percent in sorted({row.percent for row in rows}):
        axes.axvline(percent, color="#e5e7eb", linewidth=0.8, zorder=0)
    axes.plot([100], [1], marker="D", color=INK, markersize=6, linestyle="none", zorder=4)
    axes.annotate(
        "untouched",
        (100, 1),
        xytext=(0, -13),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted(
            {
                (100 * row.measured_bytes / whole_bytes, row.ratio)
                for row in rows
                if row.policy == policy and row.measured_bytes is not None and row.ratio is not None
            }
        )
        if points:
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="o",
                markersize=7 if policy == "auto" else 5.5,
                linewidth=1.8 if policy == "auto" else 1.0,
                color=COLORS.get(policy, MUTED),
                label=policy,
                zorder=3 if policy == "auto" else 2,
                markeredgecolor="white",
                markeredgewidth=0.8,
            )
    axes.set_xlabel("measured peak, % of the untouched one", color=MUTED, fontsize=9)
    axes.set_ylabel("step time, times the untouched one", color=MUTED, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    if any(row.fits for row in rows):
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


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
