"""Whether ranks that hold the same parts hold the same in them: digests, of many parts at once."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from actckpt.checkpoint.encoding import Encoded
from actckpt.checkpoint.tensor_file import bytes_of
from actckpt.sharded.layout import Layout

_DIGEST_BYTES = 16
# the group of what ranks had otherwise, which is told one by one
APART = -1


@dataclass(frozen=True, slots=True)
class Contents:
    """Digests of a rank's compared parts, one after another in the order of their names."""

    data: bytes

    def digest(self, number: int) -> bytes:
        """Of one part, by its number among them."""
        return self.data[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]

    def each(self) -> str:
        """As a message; `Contents.from_each` reads it."""
        return base64.b64encode(self.data).decode()

    @classmethod
    def from_each(cls, text: str) -> Contents:
        """From what `each` gave."""
        return cls(base64.b64decode(text))

    def grouped(self, groups: Sequence[int]) -> Grouped:
        """One digest for each group.

        Args:
            groups: for every part its group, or `APART`.
        """
        together: dict[int, Any] = {}
        apart = []
        for number, group in enumerate(groups):
            digest = self.digest(number)
            if group == APART:
                apart.append(digest.hex())
            elif group in together:
                together[group].update(digest)
            else:
                together[group] = xxhash.xxh3_128(digest)
        return Grouped({g: found.hexdigest() for g, found in together.items()}, tuple(apart))


@dataclass(frozen=True, slots=True)
class Grouped:
    """Digests of a rank's compared parts: one of every group, and those of parts that are apart."""

    together: Mapping[int, str]
    apart: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As a message."""
        return {"together": [*self.together.items()], "apart": self.apart}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grouped:
        """From what `to_json` gave."""
        return cls(dict(data["together"]), tuple(data["apart"]))


def contents_of(items: Mapping[str, Encoded], layout: Layout) -> Contents:
    """Of the parts that other ranks can hold too."""
    tensors = {
        f"{item}/{name}": tensor
        for item, encoded in items.items()
        for name, tensor in encoded.tensors.items()
    }
    return Contents(
        b"".join(
            xxhash.xxh3_128_digest(bytes_of(tensors[name]))
            for number, name in enumerate(layout.names)
            if layout.box(number).compared
        )
    )
