"""A chain of stages as numbers, and what may happen to each: plans with levels consist of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actckpt.data.plan import Burst

# what takes so long cannot be: a number, so that sums and differences stay numbers
NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Way:
    """One way to keep some of a few stages in a row, from their run until backward passes them.

    Attributes:
        stages: how many stages.
        rest_bytes: held until backward comes to them, the output of the last one apart.
        forward_bytes: the most that running them takes above what was there before.
        inside_s: what it adds where other stages run again after them.
        last_s: what it adds where what runs again ends with them; below 0 if that ends earlier.
        first_s: what it adds to a step where they are kept from the first pass on.
        bursts: what makes again the part of them that is not kept, as in the operations ``source``.
    """

    stages: int
    rest_bytes: int
    forward_bytes: int
    inside_s: float
    last_s: float
    first_s: float
    bursts: tuple[Burst, ...] = ()
    source: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Chain:
    """Stages that backward passes in reverse order, each of which reads what the last one made.

    Levels are of everything that lives at an instant, what the chain holds apart. All arrays have
    one entry a stage.

    Attributes:
        kinds: number of the stage's kind; stages of a kind have the same ways.
        ways: of each kind.
        peaks_bytes: of each stage and way the highest level in the backward of what it keeps.
        before_bytes: level as backward comes to the stage.
        first_bytes: highest level while the stage runs for the first time.
        forward_bytes: the most that running it again takes, nothing being kept.
        out_bytes: what of it the next stage reads.
        again_s: running it again in the middle of others; `NEVER_S` if that cannot be.
        last_s: running it again as the last one, only as far as backward needs it.
        edge_s: handing its output to the next stage, where it is run again.
        node_s: running anything again at all.
        after_bytes: highest level between the first pass and backward.
    """

    kinds: tuple[int, ...]
    ways: tuple[tuple[Way, ...], ...]
    peaks_bytes: tuple[tuple[int, ...], ...]
    before_bytes: np.ndarray
    first_bytes: np.ndarray
    forward_bytes: np.ndarray
    out_bytes: np.ndarray
    again_s: np.ndarray
    last_s: np.ndarray
    edge_s: np.ndarray
    node_s: float
    after_bytes: int

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def floor_bytes(self) -> int:
        """The lowest of all levels: below it a budget decides nothing."""
        peaks = min(min(row, default=0) for row in self.peaks_bytes)
        return min(
            int(self.before_bytes.min()), int(self.first_bytes.min()), self.after_bytes, peaks
        )

    def ways_of(self, stage: int) -> tuple[Way, ...]:
        """The ways that begin with a stage; some reach beyond the end of the chain."""
        return self.ways[self.kinds[stage]]


@dataclass(frozen=True, slots=True)
class Kept:
    """Stages from ``first`` on, kept in one of their ways."""

    first: int
    way: Way

    @property
    def last(self) -> int:
        """The last of the stages."""
        return self.first + self.way.stages - 1


@dataclass(frozen=True, slots=True)
class Again:
    """Stages of which nothing but the input is kept; backward runs them again as ``inside``."""

    first: int
    last: int
    inside: tuple[Kept | Again, ...]


Schedule = tuple[Kept | Again, ...]
