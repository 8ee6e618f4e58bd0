"""``actckpt checkpoint ls``: which checkpoints a run has, and where each lies."""

from __future__ import annotations

import argparse
import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from actckpt.checkpoint.discovery import Checkpoint, Skipped, existing
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import is_url
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.names import rank_file
from actckpt.checkpoint.object_store import ObjectStore
from actckpt.commands.consoles import make_console
from actckpt.commands.parsers import add_command
from actckpt.errors import CheckpointError
from actckpt.units import format_bytes

# place, name, manifest, whether it is pinned
_Row = tuple[str, str, Manifest, bool]


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    ls = add_command(
        commands,
        "ls",
        about="the checkpoints of a run, newest first",
        example="actckpt checkpoint ls runs/mine\n"
        "actckpt checkpoint ls runs/mine /dev/shm/mine s3://bucket/mine",
    )
    ls.add_argument(
        "places",
        nargs="+",
        metavar="RUN",
        help="a Checkpointer's directory; with its tiers, folders or URLs, what lies where",
    )
    ls.set_defaults(run=list_checkpoints)


def list_checkpoints(args: argparse.Namespace) -> int:
    """0, after printing the checkpoints of a run and what cannot be used.

    Raises:
        CheckpointError: in one of the places there is nothing of the kind.
    """
    rows: list[_Row] = []
    skipped: list[Skipped] = []
    for place in args.places:
        found, bad = _stored(place) if is_url(place) else _in_folder(place)
        rows += found
        skipped += bad
    # of equal ones in the order of the places
    rows.sort(key=lambda row: (row[2].serial, row[2].step), reverse=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    for place, name, manifest, pinned in rows:
        where = [Text(place, overflow="fold")] if len(args.places) > 1 else []
        table.add_row(*where, *_cells(name, manifest, pinned))
    make_console().print(table)
    for each in skipped:
        print(f"{each.name}  cannot be used: {each.reason}")
    return 0


def _in_folder(place: str) -> tuple[list[_Row], list[Skipped]]:
    found = existing(Files(), place)
    rows = [(place, _named(c), c.manifest, c.pinned) for c in found.checkpoints]
    return rows, list(found.skipped)


def _named(checkpoint: Checkpoint) -> str:
    """Its name; of a node's part of one, whose files there are."""
    world, files = checkpoint.manifest.world_size, Files()
    here = [r for r in range(world) if files.status(f"{checkpoint.path}/{rank_file(r)}")]
    name = checkpoint.path.name
    return name if len(here) == world else f"{name} (ranks {_listed(here)} of {world})"


def _listed(ranks: list[int]) -> str:
    """``0-3, 6``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{r[0]}-{r[-1]}" if r[1:] else f"{r[0]}" for r in runs) or "none"


def _stored(place: str) -> tuple[list[_Row], list[Skipped]]:
    stored, skipped = ObjectStore(place, "manifest").stored()
    if not stored and not skipped:
        raise CheckpointError(
            f"{place} holds no checkpoints: give the URL of a Checkpointer's tier"
        )
    return [(place, s.name, s.manifest, False) for s in stored], skipped


def _cells(name: str, manifest: Manifest, pinned: bool) -> list[str]:
    metrics = "  ".join(f"{key}={value:.6g}" for key, value in manifest.metrics.items())
    return [
        name,
        saved_at(manifest),
        format_bytes(manifest.size_bytes)
        + (f" + {format_bytes(manifest.base_bytes)} frozen" if manifest.base else ""),
        "pinned" if pinned else "",
        manifest.tag,
        metrics,
    ]


def saved_at(manifest: Manifest) -> str:
    """When a checkpoint was saved, for a reader."""
    then = datetime.datetime.fromtimestamp(manifest.saved_at_s, tz=datetime.UTC)
    return then.strftime("%Y-%m-%d %H:%M:%S UTC")
