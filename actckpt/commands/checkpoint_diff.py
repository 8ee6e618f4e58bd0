"""``actckpt checkpoint diff A B``: in what two checkpoints differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.checkpoint.difference import differences
from actckpt.checkpoint.discovery import checkpoint_at
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.verification import read_state


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = commands.add_parser(
        "diff", help="every value in which two differ; exit status 1 if there is one"
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
    first, a = _read(args.first)
    second, b = _read(args.second)
    for line in differences(first.versions, second.versions, "versions"):
        print(line)
    lines = list(differences(a, b))
    for line in lines:
        print(line)
    print(f"{len(lines)} values differ" if lines else "the same state, bit for bit")
    return 1 if lines else 0


def _read(path: Path) -> tuple[Manifest, dict[str, Any]]:
    checkpoint = checkpoint_at(Files(), str(path))
    print(checkpoint.path)
    return read_state(Files(), str(checkpoint.path))
