"""What lives beside a chain of stages at each operation of a step."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Mapping

import numpy as np

from actckpt.pricing.simulate import Pricer


class ChainLevels:
    """The memory of a step that saves nothing of a chain.

    Args:
        mine: saves that the chain decides about.
        until: storage -> operation before which what the chain reads of it is let go of.
        beside: (first operation, operation before which it goes, bytes) of what else is kept.

    Attributes:
        level: bytes during each operation, scratch included.
        before: bytes before each operation.
    """

    def __init__(
        self,
        pricer: Pricer,
        mine: Container[int],
        until: Mapping[int, int],
        beside: Iterable[tuple[int, int, int]] = (),
    ) -> None:
        self.pricer = pricer
        end = pricer.died.copy()
        for k, storage in enumerate(pricer.save_storage):
            if storage >= 0 and k not in mine:
                end[storage] = max(end[storage], pricer.released[k])
        for storage, stop in until.items():
            end[storage] = max(end[storage], stop)
        count = pricer.count
        begins, ends = np.maximum(pricer.born, 0), np.clip(end, 0, count)
        change, begun = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
        np.add.at(change, begins, pricer.bytes)
        np.add.at(change, ends, -pricer.bytes)
        for start, stop, size in beside:
            change[start] += size
            change[stop] -= size
        new = (pricer.born >= 0) & (ends > begins)
        np.add.at(begun, begins[new], pricer.bytes[new])
        level = np.cumsum(change)
        self.level = level[:count] + pricer.workspace
        self.before = level - begun

    def backward(self, made: Mapping[int, int], first: int, last: int) -> np.ndarray:
        """The level during ``[first, last)`` beside what is kept.

        Args:
            made: storage -> operation at whose end backward lets go of it.
        """
        found = self.level[first:last].copy()
        for storage, released in made.items():
            found[: max(0, min(released, last) - first)] += self.pricer.bytes[storage]
        return found

    def forward_peak_bytes(self, first: int, last: int, stay: Container[int] = ()) -> int:
        """The most that running ``[first, last)`` again takes, where only ``stay`` is kept."""
        pricer = self.pricer
        level = peak = 0
        dying: list[tuple[int, int]] = []
        for i in range(first, last):
            while dying and dying[0][0] <= i:
                level -= heapq.heappop(dying)[1]
            for storage in pricer.by_birth.get(i, ()):
                size = int(pricer.bytes[storage])
                level += size
                if storage not in stay:
                    heapq.heappush(dying, (int(pricer.died[storage]), size))
            peak = max(peak, level + int(pricer.workspace[i]))
        return peak
