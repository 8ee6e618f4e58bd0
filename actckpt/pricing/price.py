"""The price of a plan as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from actckpt.data.brief import brief


@dataclass(frozen=True, slots=True)
class Price:
    """What a training step is predicted to need.

    Attributes:
        peak_bytes: highest level of the step, workspaces included.
        added_bytes: the peak above what exists before the step begins (parameters, buffers,
            optimizer state, batch, constants) and above the gradients: ``scope="activations"``.
        time_s: time of the step.
        timeline: level in bytes after each operation of the untouched step, with recomputations
            merged into the instant at which they happen.
        peak_at: index of the operation at which the peak is reached.
        region_bytes: for each region of the plan in ``Plan.walk()`` order, bytes no longer saved.
        region_s: for each region in the same order, the time of its recomputation.
        following_s: what of ``time_s`` following the forward for bursts takes.
    """

    peak_bytes: int
    added_bytes: int
    time_s: float
    timeline: tuple[int, ...]
    peak_at: int
    region_bytes: tuple[int, ...] = ()
    region_s: tuple[float, ...] = ()
    following_s: float = 0.0

    __repr__ = brief
