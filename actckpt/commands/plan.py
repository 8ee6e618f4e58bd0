"""``actckpt plan TARGET --budget-gb G``: the report of a plan, without a real step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from actckpt.api import optimize, report
from actckpt.asked import effort_for
from actckpt.budget import budget_bytes
from actckpt.commands.parsers import add_command
from actckpt.commands.target_options import add_effort_option, add_target_options, describe, load
from actckpt.data.budget_error import BudgetError
from actckpt.planning.making import make_plan
from actckpt.planning.request import Request
from actckpt.policies import POLICIES
from actckpt.profiler.devices import Device, find_device
from actckpt.reporting.assemble import assemble_report, with_bound
from actckpt.reporting.report import SUFFIXES, Report
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import optimizers_of
from actckpt.tracing.step import Step
from actckpt.units import unit_of


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "plan",
        about="plan a model for a budget and print the report, without running it",
        example="actckpt plan gpt2 --set n_layer=6 --budget-gb 3GB --save plan.html\n"
        "actckpt plan llama --device h100-80gb --dtype bf16 --budget-gb 32 --optimizer sgd",
    )
    add_target_options(parser)
    parser.add_argument(
        "--budget-gb",
        type=budget,
        metavar="G",
        help="in GB of 10^9 bytes, or with a unit: 8GiB, 500MB, or a share of the device's memory: "
        "80%%; left out: apply --policy unbounded (auto, for a device that is not here: its memory "
        "less a reserve)",
    )
    parser.add_argument(
        "--policy", choices=list(POLICIES), default="auto", help="what decides what is recomputed"
    )
    add_effort_option(parser)
    parser.add_argument(
        "--save",
        type=report_path,
        action="append",
        default=[],
        metavar="FILE",
        help="also write the report: .html, .json, .txt or .png; repeatable",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, after printing the report.

    Raises:
        ActckptError: no such target, or no plan fits.
    """
    elsewhere = find_device(args.device)
    if elsewhere is not None:
        bound = budget_for(elsewhere, args.budget_gb, args.policy, args.scope)
    model, batch, optimizer = load(args)
    print(describe(args, model))
    if elsewhere is None:
        optimize(
            model,
            args.budget_gb,
            batch=batch,
            optimizer=optimizer,
            policy=args.policy,
            effort=args.effort,
            scope=args.scope,
        )
        found = report(model)
    else:
        step = Step(
            Call.of(batch), optimizers=optimizers_of(optimizer), stand_in=elsewhere.stand_in
        )
        effort = effort_for(args.policy, args.effort)
        request = Request(bound, args.policy, args.scope, unit_of(args.budget_gb), effort)
        found = estimated(model, step, request)
    print(found)
    for path in args.save:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        print(f"wrote {path}")
    return 0


def budget_for(device: Device, asked: str | None, policy: str, scope: str) -> int | None:
    """The budget in bytes on a device that is not here; prints what it assumes where none is given.

    Raises:
        BudgetError: the device has less memory, or none is given and none can be assumed.
    """
    if asked is None:
        if policy != "auto":
            return None
        if scope != "step":
            raise BudgetError(f"--scope {scope} needs a budget: pass --budget-gb")
        print(
            f"no --budget-gb: {device.default_budget_bytes / 1e9:.1f} GB assumed, the "
            f"{device.capacity_bytes / 1e9:.0f} GB of {device.name} less a reserve of "
            f"{device.reserve_bytes / 1e9:.1f} GB"
        )
        return device.default_budget_bytes
    bound = budget_bytes(asked, lambda: device.capacity_bytes)
    if bound > device.capacity_bytes:
        raise BudgetError(
            f"budget {bound / 1e9:.3f} GB is more than the "
            f"{device.capacity_bytes / 1e9:.0f} GB that {device.name} has; "
            f"pass --budget-gb {device.default_budget_bytes / 1e9:.1f} or less",
            budget_bytes=bound,
        )
    return bound


def estimated(model: nn.Module, step: Step, request: Request) -> Report:
    """The report of a plan for a device that is not here; the model is left as it was.

    Raises:
        BudgetError, PlanError, TraceError: as `actckpt.optimize`.
    """
    planned = make_plan(model, step, request)
    found = assemble_report(planned, request, model=type(model).__name__)
    return with_bound(found, planned, request)


def budget(text: str) -> str:
    """``text`` if it is a budget, of whatever device, for argparse."""
    try:
        budget_bytes(text, lambda: 10**9)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def report_path(text: str) -> Path:
    """``text`` as a path that a report can be saved to, for argparse."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(SUFFIXES)}")
    return path
