"""``actckpt checkpoint prune RUN``: the retention of a `Checkpointer`, by hand.

The journal loses the steps that no checkpoint which stays would make again, as it does there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import existing
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.frozen_files import sweep
from actckpt.checkpoint.journal_file import cut_back
from actckpt.checkpoint.lock import DirectoryLock
from actckpt.checkpoint.retention import Keep, clean, retire
from actckpt.checkpoint.verification import verify_files
from actckpt.commands.parsers import add_command
from actckpt.errors import CheckpointError
from actckpt.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "prune",
        example="actckpt checkpoint prune runs/mine --keep-last 2 --keep-best loss min 1 --dry-run",
        about="delete checkpoints that nothing keeps",
        description="Delete the checkpoints that neither an option nor a pin keeps; the newest "
        "always stays, and is verified first. The journal is cut back with them.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="a Checkpointer's directory")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    parser.add_argument("--keep-last", type=int, default=3, metavar="N", help="the newest")
    parser.add_argument(
        "--keep-best",
        nargs=3,
        metavar=("METRIC", "min|max", "N"),
        help="the best by a metric, besides",
    )
    parser.add_argument("--keep-every", type=int, metavar="STEPS", help="multiples, besides")
    for name in ("hourly", "daily"):
        about = (
            f"the newest of each of the last N {'hours' if name == 'hourly' else 'days'}, besides"
        )
        parser.add_argument(f"--keep-{name}", type=int, metavar="N", help=about)
    parser.set_defaults(run=prune)


def prune(args: argparse.Namespace) -> int:
    """0, after deleting what nothing keeps, or printing it.

    Raises:
        CheckpointError: the newest checkpoint does not verify, somebody else writes there, or
            there is nothing of the kind; nothing was deleted.
    """
    files, directory = Files(), str(args.directory)
    keep = _policy(args)
    existing(files, directory)
    if args.dry_run:
        _prune(files, directory, keep, dry=True)
        return 0
    try:
        lock = DirectoryLock(files, directory)
        try:
            _prune(files, directory, keep, dry=False)
            clean(files, directory)
        finally:
            lock.release()
    except (OSError, EOFError) as error:
        raise CheckpointError(
            f"{directory} could not be pruned to the end: {error}. What is still listed is whole"
        ) from error
    return 0


def _policy(args: argparse.Namespace) -> Keep:
    best = args.keep_best
    try:
        return Keep(args.keep_last, (best[0], best[1], int(best[2])) if best else None,
                    args.keep_every, args.keep_hourly, args.keep_daily)  # fmt: skip
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _prune(files: Files, directory: str, keep: Keep, *, dry: bool) -> None:
    found = existing(files, directory)
    for skipped in found.skipped:
        print(f"{skipped.name}  left alone, cannot be used: {skipped.reason}")
    kept = {c.path for c in keep(found.checkpoints)}
    doomed = [c for c in found.checkpoints if c.path not in kept]
    if doomed:
        # before the last copy of anything goes, what stays must be worth it
        verify_files(files, str(found.checkpoints[0].path))
    if doomed and not dry:
        retire(files, directory, doomed)
        left = [c for c in found.checkpoints if c.path in kept]
        if not found.skipped:  # which may name what they share
            sweep(files, directory, [c.manifest for c in left])
        serials = frozenset(c.manifest.serial for c in left)
        cut_back(files, directory, min(c.step for c in left), serials)
    verb = "would be deleted" if dry else "deleted"
    for checkpoint in found.checkpoints:
        print(f"{checkpoint.path.name}  {'stays' if checkpoint.path in kept else verb}")
    freed = sum(c.size_bytes for c in doomed)
    print(f"{len(doomed)} of {len(found.checkpoints)} {verb}, {format_bytes(freed)}")
