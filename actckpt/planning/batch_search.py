"""The largest batch that a plan fits, found by planning alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger("actckpt")

# doublings that no real batch size reaches: where nothing limits the batch, the search ends
MAX_BATCH = 1 << 24


@dataclass(frozen=True, slots=True)
class BatchTried:
    """One batch size: what its plan is predicted to need.

    Args:
        fits: whether a plan within the budget was found.
        peak_bytes: of that plan, or the smallest budget that the batch needs.
        step_s: predicted time of a step; None where it does not fit.
        regions: how many regions or bursts the plan recomputes.
    """

    batch_size: int
    fits: bool
    peak_bytes: int
    step_s: float | None = None
    regions: int = 0

    @property
    def samples_per_s(self) -> float:
        """Predicted throughput, 0 where it does not fit."""
        return self.batch_size / self.step_s if self.step_s else 0.0


@dataclass(frozen=True, slots=True)
class BatchSearch:
    """What `actckpt.find_max_batch` found; ``tried`` in the order of their sizes."""

    tried: tuple[BatchTried, ...]

    @property
    def largest(self) -> int:
        """The largest batch size that fits."""
        return max(t.batch_size for t in self.tried if t.fits)

    @property
    def fastest(self) -> int:
        """The batch size of the most samples per second among those tried, the smaller of two."""
        return max(
            (t for t in self.tried if t.fits), key=lambda t: (t.samples_per_s, -t.batch_size)
        ).batch_size

    def __str__(self) -> str:
        lines = ["batch   peak, GB   step, s   samples/s   regions"]
        for t in self.tried:
            if t.step_s is None:
                lines.append(f"{t.batch_size:5d}   {t.peak_bytes / 1e9:8.3f}   does not fit")
                continue
            marks = [
                name
                for name, size in (("largest", self.largest), ("fastest", self.fastest))
                if size == t.batch_size
            ]
            lines.append(
                f"{t.batch_size:5d}   {t.peak_bytes / 1e9:8.3f}   {t.step_s:7.4f}   "
                f"{t.samples_per_s:9.1f}   {t.regions:7d}   {', '.join(marks)}".rstrip()
            )
        return "\n".join(lines)


def search(attempt: Callable[[int], BatchTried], start: int, limit: int) -> BatchSearch:
    """Doubles from ``start`` until a batch does not fit, then halves the distance between the two.

    Takes it that a batch fits where a larger one does. O(log of the answer) plans.

    Args:
        attempt: plans for a batch size.
        start: the first one, which must fit.
        limit: never tries a larger one.
    """
    tried: dict[int, BatchTried] = {}

    def fits(size: int) -> bool:
        found = tried[size] = attempt(size)
        logger.info(
            "actckpt: batch %d %s",
            size,
            f"fits: {found.samples_per_s:.1f} samples/s" if found.fits else "does not fit",
        )
        return found.fits

    below, above = 0, 0
    size = min(start, limit)
    while fits(size):
        below = size
        if size == limit:
            break
        size = min(2 * size, limit)
    else:
        above = size
    while below and above - below > 1:
        middle = (below + above) // 2
        if fits(middle):
            below = middle
        else:
            above = middle
    return BatchSearch(tuple(tried[size] for size in sorted(tried)))
