"""Bytes at each operation of a step, in little room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """An array as its runs of equal numbers.

    What one recomputation changes is nothing nearly everywhere: of a large model with thousands of
    choices, whole arrays would be most of the memory that planning takes.

    Attributes:
        count: operations of the step.
        starts: first operation of each run, ascending from 0.
        values: bytes during each run.
    """

    count: int
    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, levels: np.ndarray) -> Levels:
        """The same numbers; ``levels`` has one an operation."""
        starts = np.append(0, np.flatnonzero(np.diff(levels)) + 1)[: len(levels)]
        return cls(len(levels), starts, levels[starts])

    def whole(self) -> np.ndarray:
        """All of them, a new array."""
        return np.repeat(self.values, np.diff(self.starts, append=self.count))

    def at(self, operations: np.ndarray) -> np.ndarray:
        """Those at some operations."""
        return self.values[np.searchsorted(self.starts, operations, side="right") - 1]
