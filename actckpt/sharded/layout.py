"""What one rank holds of a state: its boxes of tensors, and digests of what others may hold too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.encoding import Encoded
from actckpt.checkpoint.tensor_file import bytes_of


@dataclass(frozen=True, slots=True)
class Box:
    """A rank's part of one tensor.

    Args:
        dtype: torch's name of it.
        shape: of the whole tensor.
        offset: where the part begins in it.
        part: its shape.
        digest: of its bytes; "" where no other rank can hold the same part.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    part: tuple[int, ...]
    digest: str

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.part == self.shape


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that a rank holds.

    Args:
        trees: by item, digests of what is no tensor.
        boxes: by item and name.
    """

    trees: dict[str, str]
    boxes: dict[str, Box]

    def to_json(self) -> dict[str, Any]:
        """As a message."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """From what `to_json` gave."""
        boxes = {
            name: Box(
                dtype=b["dtype"],
                shape=tuple(b["shape"]),
                offset=tuple(b["offset"]),
                part=tuple(b["part"]),
                digest=b["digest"],
            )
            for name, b in data["boxes"].items()
        }
        return cls(dict(data["trees"]), boxes)


def layout_of(items: Mapping[str, Encoded], world_size: int) -> Layout:
    """What this rank holds of some items.

    Args:
        world_size: tensors that are cut over so many ranks are nowhere twice.
    """
    boxes = {
        f"{item}/{name}": _box(encoded, name, tensor, world_size)
        for item, encoded in items.items()
        for name, tensor in encoded.tensors.items()
    }
    return Layout({item: digest_of_tree(e.tree) for item, e in items.items()}, boxes)


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
    digest = ""
    if not alone and tensor.numel():
        digest = xxhash.xxh3_128_hexdigest(bytes_of(tensor))
    return Box(name_of(tensor.dtype), shape, offset, part, digest)
