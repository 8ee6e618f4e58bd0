"""``actckpt checkpoint``: what a directory of checkpoints holds, and what is done with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import checkpoint_at, existing
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.names import FROZEN, MANIFEST
from actckpt.checkpoint.verification import read_shares, verify_files
from actckpt.commands import (
    checkpoint_diff,
    checkpoint_export,
    checkpoint_import,
    checkpoint_journal,
    checkpoint_ls,
    checkpoint_prune,
)
from actckpt.commands.checkpoint_ls import saved_at
from actckpt.commands.parsers import add_command
from actckpt.errors import CheckpointFormatError
from actckpt.exporting.folder import MANIFEST as EXPORT_MANIFEST
from actckpt.exporting.folder import verify_folder


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "checkpoint",
        about="list, show, verify, compare, prune and export checkpoints on disk",
        description="Checkpoints on disk. Only prune changes what is there.",
        example="actckpt checkpoint ls runs/mine\n"
        "actckpt checkpoint prune runs/mine --keep-last 2 --dry-run",
    )
    inner = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    checkpoint_ls.add_parser(inner)
    either = "one checkpoint, or a run for its newest"
    show = add_command(
        inner,
        "show",
        about="what one checkpoint holds",
        example="actckpt checkpoint show runs/mine/step-00000200",
    )
    show.add_argument("checkpoint", type=Path, metavar="RUN|CHECKPOINT", help=either)
    show.set_defaults(run=show_checkpoint)
    verify = add_command(
        inner,
        "verify",
        about="read every byte; exit status 1 if one is wrong",
        example="actckpt checkpoint verify runs/mine",
    )
    verify.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN|CHECKPOINT|EXPORT",
        help="one, or a run for all of its own; or an exported folder",
    )
    verify.set_defaults(run=verify_checkpoints)
    for command in (checkpoint_diff, checkpoint_journal, checkpoint_prune, checkpoint_export,
                    checkpoint_import):  # fmt: skip
        command.add_parser(inner)


def show_checkpoint(args: argparse.Namespace) -> int:
    """0, after printing what a checkpoint, or the newest of a run, holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint = checkpoint_at(Files(), str(args.checkpoint))
    manifest = checkpoint.manifest
    print(f"{checkpoint.path}: step {checkpoint.step}, saved {saved_at(manifest)}")
    files, tensors, written_by = {**manifest.files}, manifest.tensors, ""
    if manifest.world_size:
        shares = read_shares(Files(), str(checkpoint.path), manifest)
        files |= {name: entry for share in shares.ranks for name, entry in share.files.items()}
        tensors = shares.tensors(None, str(checkpoint.path))
        written_by = f" of {manifest.world_size} ranks"
    print(f"{manifest.size_bytes} bytes in {len(files)} files{written_by}{_beside(manifest)}")
    if manifest.tag:
        print(f"tag {manifest.tag}")
    print(f"model {manifest.fingerprint} (names, dtypes and shapes of its tensors)")
    for name, value in manifest.metrics.items():
        print(f"metric {name} = {value!r}")
    for name, text in manifest.versions.items():
        print(f"{name} {text}")
    for file, entry in {**files, **manifest.base}.items():
        print(f"{file}  {entry.size_bytes} bytes  {entry.checksum}")
    frozen = manifest.in_base
    for name, tensor in tensors.items():
        parts = f" in {len(tensor.chunks)} parts" if len(tensor.chunks) > 1 else ""
        parts += " frozen" if name in frozen else ""
        print(f"{name}  {tensor.dtype} {list(tensor.shape)}{parts}")
    return 0


def verify_checkpoints(args: argparse.Namespace) -> int:
    """0 if every byte of a checkpoint, a run's or an export is as it was written; else 1.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    path: Path = args.checkpoint
    if (path / EXPORT_MANIFEST).exists():
        return _verify_export(path)
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
            ranks = f" of {manifest.world_size} ranks" if manifest.world_size else ""
            count = f"{len(manifest.files)} files" if not ranks else "files"
            size = f"{manifest.size_bytes} bytes{_beside(manifest)}"
            print(f"{each.name}: {count}{ranks}, {size}, sound")
    return 1 if failed else 0


def _beside(manifest: Manifest) -> str:
    return f", and {manifest.base_bytes} bytes in {FROZEN}" if manifest.base else ""


def _verify_export(path: Path) -> int:
    try:
        files = verify_folder(Files(), str(path))["files"]
    except CheckpointFormatError as error:
        print(f"{path.name}: {error}")
        return 1
    size_bytes = sum(entry["size_bytes"] for entry in files.values())
    print(f"{path.name}: {len(files)} files, {size_bytes} bytes, sound")
    return 0
