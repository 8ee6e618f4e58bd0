"""What one process of a run reads of a checkpoint that many ranks wrote."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.rank_manifest import Shares
from actckpt.checkpoint.united import PER_RANK
from actckpt.resuming.random_states import other_stream
from actckpt.sharded.loading import ShareReading
from actckpt.sharded.reading_once import ReadingOnce

# for (item, name, shape) of a tensor the distributed one that it is cut like
Like = Callable[[str, str, tuple[int, ...]], Any]


@dataclass(frozen=True, slots=True)
class Share:
    """The items for one process.

    Args:
        inexact: why they cannot be all that the process would have had.
    """

    items: dict[str, Any]
    inexact: tuple[str, ...] = ()


def read_share(
    files: Files,
    directory: str,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    like: Like,
    joined: Container[str],
    once: ReadingOnce | None = None,
) -> Share:
    """What rank ``rank`` of ``world_size`` takes of a checkpoint, every byte of it verified.

    In another world than that which saved, a rank that there was not takes what was rank 0's, and
    draws from a stream of its own if those that there were did.

    Args:
        joined, once: as for `ShareReading`.

    Raises:
        CheckpointFormatError: as `verify_files`, of what is read.
    """
    same_world = manifest.world_size == world_size
    reading = ShareReading(
        files,
        directory,
        manifest,
        rank=rank,
        like=like,
        joined=joined,
        same_world=same_world,
        once=once,
    )
    items = reading.items()
    if same_world:
        return Share(items)
    inexact = []
    shares = reading.shares
    own = sorted({n for r in shares.ranks for n in r.own if n.split("/")[0] not in PER_RANK})
    if own:
        more = f" (and {len(own) - 1} more)" if len(own) > 1 else ""
        inexact.append(f"ranks had {own[0]}{more} each otherwise: rank 0's is everybody's now")
    otherwise = {item for r in shares.ranks[1:] for item in (*r.trees, *r.without)}
    if apart := sorted(i for i in otherwise if i not in joined and i not in PER_RANK):
        more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
        inexact.append(
            f"ranks had {apart[0]}{more} each otherwise: a rank that there was has its own, any "
            "other what the first had"
        )
    if items.get("gradients"):
        inexact.append("gradients that ranks had accumulated are summed over other ranks now")
    if rank >= manifest.world_size and _draw_apart(shares):
        items = {**items, "random": other_stream(items["random"], rank)}
    return Share(items, tuple(inexact))


def _draw_apart(shares: Shares) -> bool:
    """Whether ranks had other random states each."""
    tensors = (name for r in shares.ranks for name in r.own)
    trees = (item for r in shares.ranks[1:] for item in r.trees)
    return any(n.startswith("random/") for n in tensors) or "random" in trees
