"""Which ranks hold which part of a state: found once for layouts that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.errors import CheckpointSaveError
from actckpt.sharded.layout import Box, Layout


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor that several ranks hold, or could.

    Args:
        box: as the first of them has it.
        ranks: all that hold it.
        alike: those whose box is equal; the others have another tensor of that name, whole.
        compared: those that say what they hold in it.
    """

    box: Box
    ranks: tuple[int, ...]
    alike: tuple[int, ...]
    compared: tuple[int, ...]


class Holders:
    """Who holds what.

    Tensors that all ranks cut alike are looked at once: O(ranks x kinds of tensors), beside one
    look at O(ranks x tensors) numbers.

    Args:
        layouts: by rank.

    Attributes:
        parts: with the name of the tensor, in the order of the names; those that one rank holds
            and no other can are not among them.
        alone_bytes: by rank, of these.

    Raises:
        CheckpointSaveError: the ranks do not hold one and the same tensors.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = layouts
        self.parts: list[tuple[str, Part]] = []
        self.alone_bytes = [0] * len(layouts)
        # ranks have the same names, but for stages of a pipeline
        tables = {id(layout.names): layout.names for layout in layouts}
        self._numbers = {
            key: {name: number for number, name in enumerate(names)}
            for key, names in tables.items()
        }
        names = {name for table in self._numbers.values() for name in table}
        self._names = layouts[0].names if len(tables) == 1 else sorted(names)
        kinds: dict[Box, int] = {}
        columns = [self._row(layout, kinds) for layout in layouts]
        boxes = [*kinds]
        seen: dict[tuple[int, ...], tuple[list[Part], list[tuple[int, int]]]] = {}
        for name, column in zip(self._names, zip(*columns, strict=True), strict=True):
            if column not in seen:
                seen[column] = _parted(name, column, boxes)
            parts, alone = seen[column]
            self.parts += [(name, part) for part in parts]
            for rank, size_bytes in alone:
                self.alone_bytes[rank] += size_bytes

    def number(self, rank: int, name: str) -> int:
        """Of a tensor in a rank's layout."""
        return self._numbers[id(self.layouts[rank].names)][name]

    def compared(self, rank: int) -> dict[str, int]:
        """The names of the parts of which a rank says what they hold, numbered."""
        layout = self.layouts[rank]
        told = [box.compared for box in layout.boxes]
        names = (n for n, which in zip(layout.names, layout.which, strict=True) if told[which])
        return {name: number for number, name in enumerate(names)}

    def _row(self, layout: Layout, kinds: dict[Box, int]) -> Sequence[int]:
        """For every name the number of the rank's box among all; -1 where it has none."""
        here = [kinds.setdefault(box, len(kinds)) for box in layout.boxes]
        row = [here[which] for which in layout.which]
        if len(self._numbers) == 1:
            return row
        by_name = dict(zip(layout.names, row, strict=True))
        return [by_name.get(name, -1) for name in self._names]


def size_bytes(box: Box) -> int:
    """Of what a rank holds of a tensor."""
    return math.prod(box.part) * BY_NAME[box.dtype].itemsize


def _parted(
    name: str, column: Sequence[int], boxes: Sequence[Box]
) -> tuple[list[Part], list[tuple[int, int]]]:
    """The parts of one tensor, and (rank, size in bytes) of what only one rank can hold."""
    by = next(rank for rank, number in enumerate(column) if number >= 0)
    first = boxes[column[by]]
    holders: dict[tuple[int, ...] | None, list[int]] = {}
    for number, run in groupby(range(len(column)), column.__getitem__):
        if number < 0:
            continue
        box, held = boxes[number], [*run]
        alike = (first.dtype, first.shape) == (box.dtype, box.shape)
        if not alike and not (first.is_whole and box.is_whole):
            raise CheckpointSaveError(
                f"{name} is {first.dtype} {list(first.shape)} on rank {by} and {box.dtype} "
                f"{list(box.shape)} on rank {held[0]}, which hold parts of it: ranks have to "
                "train one and the same model"
            )
        if math.prod(box.part) or box.is_whole:
            holders.setdefault(None if box.is_whole else box.offset, []).extend(held)
    parts, alone, volume = [], [], 0
    for ranks in holders.values():
        number = column[ranks[0]]
        box = boxes[number]
        volume += math.prod(box.part)
        if len(ranks) == 1 and not box.compared:
            alone.append((ranks[0], size_bytes(box)))
            continue
        compared = tuple(r for r in ranks if boxes[column[r]].compared)
        parts.append(Part(box, tuple(ranks), tuple(r for r in ranks if column[r] == number),
                          compared))  # fmt: skip
    if volume != math.prod(first.shape):
        raise CheckpointSaveError(
            f"the ranks hold {volume} of the {math.prod(first.shape)} elements of {name}: "
            "every rank that holds a part has to save"
        )
    return parts, alone
