"""``actckpt checkpoint export CHECKPOINT FILE``: the weights, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.checkpoint.export import export_weights


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = commands.add_parser("export", help="the weights as one safetensors file")
    parser.add_argument("checkpoint", type=Path, metavar="RUN|CHECKPOINT")
    parser.add_argument("file", type=Path, metavar="FILE", help="the new file")
    parser.add_argument("--item", default="model", help="what to export (default: %(default)s)")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """0, after writing the file.

    Raises:
        CheckpointError: as `export_weights`.
    """
    path = export_weights(args.checkpoint, args.file, item=args.item)
    print(f"{path}: {path.stat().st_size} bytes")
    return 0
