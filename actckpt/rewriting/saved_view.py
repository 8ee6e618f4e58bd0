"""A saved view of a tensor that is going to be made again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tensor lies in its storage: sizes, strides and offset in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """The layout of a strided tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def holds(self, other: Layout) -> bool:
        """Whether every element of ``other``, in the same storage, is known to be one of these."""
        if not math.prod(other.shape):
            return True
        if self.offset == other.offset and self._axes() == other._axes():
            return True  # transposed
        last = self.offset + self._reach()
        inside = self.offset <= other.offset and other.offset + other._reach() <= last
        return inside and self._has_no_gaps()

    def _axes(self) -> list[tuple[int, int]]:
        return sorted((s, n) for n, s in zip(self.shape, self.stride, strict=True) if n != 1)

    def _reach(self) -> int:
        """How far behind the first element the last one lies."""
        return sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def _has_no_gaps(self) -> bool:
        expected = 1
        for stride, size in self._axes():
            if stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class SavedView:
    """A view of a tensor, to be looked through again at one that is laid out alike.

    Attributes:
        base_stride: strides of the tensor.
        layout: of the view; its offset counts from that of the tensor.
    """

    base_stride: tuple[int, ...]
    layout: Layout

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is laid out as the one that this is a view of."""
        return tensor.stride() == self.base_stride

    def look(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of ``tensor``."""
        offset = int(tensor.storage_offset()) + self.layout.offset
        return tensor.as_strided(self.layout.shape, self.layout.stride, offset)
