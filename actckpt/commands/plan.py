"""``actckpt plan TARGET --budget-gb G``: the report of a plan, without a real step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from actckpt.api import optimize, report
from actckpt.commands.target_options import add_target_options, describe, load
from actckpt.errors import BudgetError
from actckpt.planning import Request, make_plan
from actckpt.policies import POLICIES
from actckpt.profiler.devices import Device, find_device
from actckpt.reporting.assemble import assemble_report, with_bound
from actckpt.reporting.report import SUFFIXES, Report
from actckpt.targets import parse_bytes
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import optimizers_of
from actckpt.tracing.step import Step


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = commands.add_parser(
        "plan",
        help="plan a model for a budget and print the report, without running it",
        description="Plan TARGET for a budget and print the report, without running it.",
    )
    add_target_options(parser)
    parser.add_argument(
        "--budget-gb",
        type=budget,
        metavar="G",
        help="in GB of 10^9 bytes, or with a unit: 8GiB, 500MB; left out: apply --policy unbounded "
        "(auto, for a device that is not here: its memory less a reserve)",
    )
    parser.add_argument(
        "--policy", choices=list(POLICIES), default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--save",
        type=report_path,
        action="append",
        default=[],
        metavar="FILE",
        help="also write the report: .json, .txt or .png; repeatable",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, after printing the report.

    Raises:
        ActckptError: no such target, or no plan fits.
    """
    elsewhere = find_device(args.device)
    if elsewhere is not None:
        args.budget_gb = budget_for(elsewhere, args.budget_gb, args.policy, args.scope)
    model, batch, optimizer = load(args)
    print(describe(args, model))
    if elsewhere is None:
        optimize(
            model,
            None if args.budget_gb is None else args.budget_gb / 1e9,
            batch=batch,
            optimizer=optimizer,
            policy=args.policy,
            scope=args.scope,
        )
        found = report(model)
    else:
        step = Step(
            Call.of(batch), optimizers=optimizers_of(optimizer), stand_in=elsewhere.stand_in
        )
        found = estimated(model, step, Request(args.budget_gb, args.policy, args.scope))
    print(found)
    for path in args.save:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        print(f"wrote {path}")
    return 0


def budget_for(device: Device, budget_bytes: int | None, policy: str, scope: str) -> int | None:
    """The budget on a device that is not here; prints what it assumes where none is given.

    Raises:
        BudgetError: the device has less memory, or none is given and none can be assumed.
    """
    if budget_bytes is None and policy == "auto":
        if scope != "step":
            raise BudgetError(f"--scope {scope} needs a budget: pass --budget-gb")
        print(
            f"no --budget-gb: {device.default_budget_bytes / 1e9:.1f} GB assumed, the "
            f"{device.capacity_bytes / 1e9:.0f} GB of {device.name} less a reserve of "
            f"{device.reserve_bytes / 1e9:.1f} GB"
        )
        return device.default_budget_bytes
    if budget_bytes is not None and budget_bytes > device.capacity_bytes:
        raise BudgetError(
            f"budget {budget_bytes / 1e9:.3f} GB is more than the "
            f"{device.capacity_bytes / 1e9:.0f} GB that {device.name} has; "
            f"pass --budget-gb {device.default_budget_bytes / 1e9:.1f} or less",
            budget_bytes=budget_bytes,
        )
    return budget_bytes


def estimated(model: nn.Module, step: Step, request: Request) -> Report:
    """The report of a plan for a device that is not here; the model is left as it was.

    Raises:
        BudgetError, PlanError, TraceError: as `actckpt.optimize`.
    """
    planned = make_plan(model, step, request)
    return with_bound(assemble_report(planned, request), planned, request)


def budget(text: str) -> int:
    """``text`` as bytes, for argparse."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def report_path(text: str) -> Path:
    """``text`` as a path that a report can be saved to, for argparse."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(SUFFIXES)}")
    return path
