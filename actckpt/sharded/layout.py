"""What one rank holds of a state: its boxes of tensors, as few of them as there are kinds."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.encoding import Encoded


@dataclass(frozen=True, slots=True)
class Box:
    """A rank's part of one tensor.

    Args:
        dtype: torch's name of it.
        shape: of the whole tensor.
        offset: where the part begins in it.
        part: its shape.
        compared: whether other ranks can hold the same part, so that its content is told.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    part: tuple[int, ...]
    compared: bool

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.part == self.shape

    def to_json(self) -> list[Any]:
        """As a message."""
        return [self.dtype, self.shape, self.offset, self.part, self.compared]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Box:
        """From what `to_json` gave."""
        dtype, shape, offset, part, compared = data
        return cls(dtype, tuple(shape), tuple(offset), tuple(part), compared)


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor that a rank holds a part of.

    Many tensors of a model are of one shape, and cut alike: they share a box.

    Args:
        names: by item and name, sorted.
        boxes: of which no two are equal.
        which: for every name, the number of its box.
    """

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    which: array[int]

    def box(self, number: int) -> Box:
        """That of a tensor, by the number of its name."""
        return self.boxes[self.which[number]]

    def boxes_to_json(self) -> dict[str, Any]:
        """All but the names, as a message."""
        return {"boxes": [b.to_json() for b in self.boxes], "which": self.which.tolist()}

    @classmethod
    def from_json(cls, names: tuple[str, ...], data: Mapping[str, Any]) -> Layout:
        """From names and what `boxes_to_json` gave."""
        return cls(names, tuple(map(Box.from_json, data["boxes"])), array("l", data["which"]))


def layout_of(items: Mapping[str, Encoded], world_size: int) -> Layout:
    """What this rank holds of some items.

    Args:
        world_size: tensors that are cut over so many ranks are nowhere twice.
    """
    numbers: dict[Box, int] = {}
    found = {
        f"{item}/{name}": numbers.setdefault(_box(encoded, name, tensor, world_size), len(numbers))
        for item, encoded in items.items()
        for name, tensor in encoded.tensors.items()
    }
    names = sorted(found)
    return Layout(tuple(names), (*numbers,), array("l", [found[name] for name in names]))


def digest_of_tree(tree: Any) -> str:
    """Of JSON data."""
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, allow_nan=False).encode())


def _box(encoded: Encoded, name: str, tensor: torch.Tensor, world_size: int) -> Box:
    part = tuple(tensor.shape)
    shard = encoded.shards.get(name)
    if shard is None:
        shape, offset, alone = part, (0,) * len(part), world_size == 1
    else:
        shape, offset = shard.shape, shard.offset
        mesh, placements = shard.whole.device_mesh, shard.whole.placements
        alone = mesh.size() == world_size and all(p.is_shard() for p in placements)
    return Box(name_of(tensor.dtype), shape, offset, part, not alone and tensor.numel() > 0)
