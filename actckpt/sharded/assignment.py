"""Who writes what of a state that many ranks hold, each byte once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.errors import CheckpointSaveError
from actckpt.sharded.layout import Box, Layout


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one rank does not write, or writes as its own.

    Args:
        skipped: names of tensors whose part here another rank writes.
        own: names of tensors that it has otherwise than the first rank that has them.
        trees: items whose tree is not that of rank 0.
        without: items that rank 0 has, and this one has not.
    """

    skipped: tuple[str, ...]
    own: tuple[str, ...]
    trees: tuple[str, ...]
    without: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As a message."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Assignment:
        """From what `to_json` gave."""
        return cls(**{name: tuple(found) for name, found in data.items()})


def assign(layouts: Sequence[Layout]) -> list[Assignment]:
    """An assignment for every rank.

    A part that several ranks hold is written by the one that has the fewest bytes to write so far,
    if their digests are equal. Otherwise each of those that differ from the first keeps its own:
    buffers that every rank has from its own data, random states. O(ranks x tensors).

    Raises:
        CheckpointSaveError: the ranks do not hold one and the same tensors.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    wholes: dict[str, tuple[Box, int]] = {}
    for rank, layout in enumerate(layouts):
        for name, box in layout.boxes.items():
            first, by = wholes.setdefault(name, (box, rank))
            alike = (first.dtype, first.shape) == (box.dtype, box.shape)
            if not alike and not (first.is_whole and box.is_whole):
                raise CheckpointSaveError(
                    f"{name} is {first.dtype} {list(first.shape)} on rank {by} and {box.dtype} "
                    f"{list(box.shape)} on rank {rank}, which hold parts of it: ranks have to "
                    "train one and the same model"
                )
            if math.prod(box.part) or box.is_whole:
                holders.setdefault((name, box.offset), []).append(rank)
    loads = [0] * len(layouts)
    skipped: list[list[str]] = [[] for _ in layouts]
    own: list[list[str]] = [[] for _ in layouts]
    volumes: dict[str, int] = dict.fromkeys(wholes, 0)
    shared = []
    for (name, offset), ranks in holders.items():
        box = layouts[ranks[0]].boxes[name]
        volumes[name] += math.prod(box.part)
        if len(ranks) == 1:
            loads[ranks[0]] += _size_bytes(box)
        else:
            shared.append((name, offset, ranks, box))
    for name, _, ranks, box in shared:
        same = [r for r in ranks if layouts[r].boxes[name] == box]
        for rank in set(ranks) - set(same):
            if not box.is_whole:
                raise CheckpointSaveError(
                    f"{name}: ranks {ranks[0]} and {rank} hold the same part of it with other "
                    "content. Replicas of a sharded tensor have to be equal: what makes them "
                    "differ makes the run another one"
                )
            own[rank].append(name)
        writer = min(same, key=lambda r: loads[r])
        loads[writer] += _size_bytes(box)
        for rank in same:
            if rank != writer:
                skipped[rank].append(name)
    for name, (box, _) in wholes.items():
        if volumes[name] != math.prod(box.shape):
            raise CheckpointSaveError(
                f"the ranks hold {volumes[name]} of the {math.prod(box.shape)} elements of {name}: "
                "every rank that holds a part has to save"
            )
    return [
        Assignment(
            tuple(skipped[rank]),
            tuple(own[rank]),
            tuple(i for i, d in layout.trees.items() if rank and d != layouts[0].trees.get(i)),
            tuple(i for i in layouts[0].trees if i not in layout.trees),
        )
        for rank, layout in enumerate(layouts)
    ]


def _size_bytes(box: Box) -> int:
    return math.prod(box.part) * BY_NAME[box.dtype].itemsize
