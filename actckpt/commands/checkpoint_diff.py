"""``actckpt checkpoint diff A B``: in what two checkpoints differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.checkpoint.difference import differences
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.reading import read_checkpoint
from actckpt.commands.parsers import add_command


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "diff",
        example="actckpt checkpoint diff runs/mine runs/yours",
        about="every value in which two differ; exit status 1 if there is one",
    )
    parser.add_argument("first", type=Path, metavar="A", help="a run, or a checkpoint")
    parser.add_argument("second", type=Path, metavar="B", help="another")
    parser.set_defaults(run=print_differences)


def print_differences(args: argparse.Namespace) -> int:
    """0 if two checkpoints hold the same state to the last bit; else 1, after printing where not.

    When and where they were saved does not count, nor do metrics; library versions are printed.

    Raises:
        CheckpointError: one cannot be read, or is damaged.
    """
    first, a = read_checkpoint(Files(), args.first)
    print(first.path)
    second, b = read_checkpoint(Files(), args.second)
    print(second.path)
    for line in differences(first.manifest.versions, second.manifest.versions, "versions"):
        print(line)
    lines = list(differences(a, b))
    for line in lines:
        print(line)
    print(f"{len(lines)} values differ" if lines else "the same state, bit for bit")
    return 1 if lines else 0
