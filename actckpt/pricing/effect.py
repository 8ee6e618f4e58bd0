"""What one recomputation changes in a step, whatever else the plan recomputes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# one state of torch's CPU generator, kept where random numbers are to be drawn again
GENERATOR_STATE_BYTES = 5056


@dataclass(slots=True)
class Event:
    """One recomputation: before operation ``at``, needing ``peak_bytes`` beside what is there."""

    at: int
    peak_bytes: int
    stays_bytes: int


@dataclass(frozen=True, slots=True)
class Effect:
    """What one outermost region or burst changes.

    Attributes:
        dropped: saves that autograd no longer holds.
        holds: (storage, operation before which it is let go of, the recomputation being done).
        extra: (start, stop, bytes) of what recomputations leave behind.
        handed: the same of what a recomputation inside is handed, and lets go of like ``holds``.
        seconds: of each region or burst of the tree, in walking order.
        dropped_bytes: in the same order.
        calls: of the forward that bursts depend on (`actckpt.interpreting.stretches`).
    """

    dropped: np.ndarray
    holds: tuple[tuple[int, int], ...]
    extra: tuple[tuple[int, int, int], ...]
    handed: tuple[tuple[int, int, int], ...]
    events: tuple[Event, ...]
    seconds: tuple[float, ...]
    dropped_bytes: tuple[int, ...]
    calls: np.ndarray | None = None
