"""``actckpt demo``: a training without a budget, under two, and killed and resumed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.commands.parsers import add_command
from actckpt.commands.target_options import positive_int


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "demo",
        example="actckpt demo --steps 10 --out runs/demo",
        about="train a small GPT without a budget and under two, and compare",
        description="Train a byte-level GPT on the Python standard library's sources: without a "
        "budget, under a loose one and under a tight one, which is then trained once more, killed "
        "in the middle and resumed. Losses must be equal to the last bit, peaks within their "
        "budgets, and a damaged copy of a checkpoint be found out; else the exit status is 1.",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=30, metavar="N", help="of each of the runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="FOLDER",
        help="where reports, figures and checkpoints are written",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if the arms agree to the last bit and fit, else 1."""
    # imports the whole public API, which only this command does
    from actckpt.demo.training import run_demo

    return run_demo(steps=args.steps, seed=args.seed, out=args.out)
