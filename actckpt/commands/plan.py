"""``actckpt plan TARGET --budget-gb G``: the report of a plan, without a real step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.api import optimize, report
from actckpt.commands.target_options import add_target_options, describe, load
from actckpt.policies import POLICIES
from actckpt.reporting.report import SUFFIXES
from actckpt.targets import parse_bytes


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
        help="in GB of 10^9 bytes, or with a unit: 8GiB, 500MB; left out: apply --policy unbounded",
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
    model, batch, optimizer = load(args)
    print(describe(args, model))
    optimize(
        model,
        None if args.budget_gb is None else args.budget_gb / 1e9,
        batch=batch,
        optimizer=optimizer,
        policy=args.policy,
        scope=args.scope,
    )
    found = report(model)
    print(found)
    for path in args.save:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        print(f"wrote {path}")
    return 0


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
