"""``actckpt checkpoint``: what a directory of checkpoints holds, and what is done with it."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint, checkpoint_at, existing
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.names import MANIFEST
from actckpt.checkpoint.verification import verify_files
from actckpt.commands import (
    checkpoint_diff,
    checkpoint_export,
    checkpoint_journal,
    checkpoint_prune,
)
from actckpt.errors import CheckpointFormatError
from actckpt.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = commands.add_parser(
        "checkpoint",
        help="list, show, verify, compare, prune and export checkpoints on disk",
        description="Checkpoints on disk. Only prune changes what is there.",
    )
    inner = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    ls = inner.add_parser("ls", help="the checkpoints of a run, newest first")
    ls.add_argument("directory", type=Path, metavar="RUN")
    ls.set_defaults(run=list_checkpoints)
    show = inner.add_parser("show", help="what one checkpoint holds")
    show.add_argument("checkpoint", type=Path, metavar="RUN|CHECKPOINT")
    show.set_defaults(run=show_checkpoint)
    verify = inner.add_parser("verify", help="read every byte; exit status 1 if one is wrong")
    verify.add_argument("checkpoint", type=Path, metavar="RUN|CHECKPOINT")
    verify.set_defaults(run=verify_checkpoints)
    for command in (checkpoint_diff, checkpoint_journal, checkpoint_prune, checkpoint_export):
        command.add_parser(inner)


def list_checkpoints(args: argparse.Namespace) -> int:
    """0, after printing the checkpoints of a run and what cannot be used.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    found = existing(Files(), str(args.directory))
    for checkpoint in found.checkpoints:
        print(_line(checkpoint))
    for skipped in found.skipped:
        print(f"{skipped.name}  cannot be used: {skipped.reason}")
    return 0


def show_checkpoint(args: argparse.Namespace) -> int:
    """0, after printing what a checkpoint, or the newest of a run, holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint = checkpoint_at(Files(), str(args.checkpoint))
    manifest = checkpoint.manifest
    print(f"{checkpoint.path}: step {checkpoint.step}, saved {_time(manifest)}")
    print(f"{manifest.size_bytes} bytes in {len(manifest.files)} files")
    if manifest.tag:
        print(f"tag {manifest.tag}")
    print(f"model {manifest.fingerprint} (names, dtypes and shapes of its tensors)")
    for name, value in manifest.metrics.items():
        print(f"metric {name} = {value!r}")
    for name, text in manifest.versions.items():
        print(f"{name} {text}")
    for file, entry in manifest.files.items():
        print(f"{file}  {entry.size_bytes} bytes  {entry.checksum}")
    for name, tensor in manifest.tensors.items():
        print(f"{name}  {tensor.dtype} {list(tensor.shape)}")
    return 0


def verify_checkpoints(args: argparse.Namespace) -> int:
    """0 if every byte of a checkpoint, or of all those of a run, is as it was written; else 1.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    path: Path = args.checkpoint
    if (path / MANIFEST).exists():
        paths, failed = [path], False
    else:
        found = existing(Files(), str(path))
        for skipped in found.skipped:
            print(f"{skipped.name}: {skipped.reason}")
        paths, failed = [c.path for c in found.checkpoints], bool(found.skipped)
    for each in paths:
        try:
            manifest = verify_files(Files(), str(each))
        except CheckpointFormatError as error:
            gone = not each.exists()  # a run that goes on deletes its old ones
            print(f"{each.name}: {'was deleted in the meantime' if gone else error}")
            failed |= not gone
        else:
            print(f"{each.name}: {len(manifest.files)} files, {manifest.size_bytes} bytes, sound")
    return 1 if failed else 0


def _line(checkpoint: Checkpoint) -> str:
    metrics = "  ".join(f"{name}={value:.6g}" for name, value in checkpoint.metrics.items())
    parts = [
        checkpoint.path.name,
        _time(checkpoint.manifest),
        format_bytes(checkpoint.size_bytes),
        "pinned" if checkpoint.pinned else "",
        checkpoint.tag,
        metrics,
    ]
    return "  ".join(part for part in parts if part)


def _time(manifest: Manifest) -> str:
    then = datetime.datetime.fromtimestamp(manifest.saved_at_s, tz=datetime.UTC)
    return then.strftime("%Y-%m-%d %H:%M:%S UTC")
