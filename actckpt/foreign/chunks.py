"""A tensor that lies in several chunks, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actckpt.errors import CheckpointFormatError
from actckpt.foreign.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor.

    Args:
        offset: in the whole, by dimension.
    """

    offset: tuple[int, ...]
    stored: StoredTensor

    @property
    def box(self) -> tuple[slice, ...]:
        """Where it is in the whole."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.stored.shape, strict=True))


def assembled(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: Sequence[Chunk]
) -> StoredTensor:
    """The whole tensor.

    Raises:
        CheckpointFormatError: the chunks do not cover it, or (when it is read) they overlap.
    """
    filled = [chunk for chunk in chunks if math.prod(chunk.stored.shape)]
    if sum(math.prod(chunk.stored.shape) for chunk in filled) != math.prod(shape):
        raise CheckpointFormatError(
            f"{name} {list(shape)} is in chunks of shape "
            f"{[list(chunk.stored.shape) for chunk in filled[:4]]}, which are not all of it"
        )

    def read() -> torch.Tensor:
        if len(filled) == 1 and filled[0].stored.shape == shape:
            return filled[0].stored.read()
        parts = [chunk.stored.read() for chunk in filled]
        whole = torch.empty(shape, dtype=dtype)
        covered = torch.zeros(shape, dtype=torch.bool)
        for chunk, part in zip(filled, parts, strict=True):
            whole[chunk.box] = part
            covered[chunk.box] = True
        if not covered.all():
            raise CheckpointFormatError(f"{name} {list(shape)} is in chunks that overlap")
        return whole

    return StoredTensor(shape, dtype, read)
