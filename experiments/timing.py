"""Step times of several arms side by side: interleaved, in processor time, with their spread."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_heap() -> bool:
    """Whether the C library was told to keep what this process frees, as CUDA's allocator does.

    Else it gives large blocks back, and whose step pays for their pages is chance: an untouched
    DenseNet took 423 ms or 370, of which 32 were page faults, and with them any plan looked up to
    six points better or worse.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one arm takes as another.

    Args:
        median: of the ratios round by round.
        low: their lower quartile.
        high: their upper quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, tuple[float, ...]]:
    """Processor seconds of every arm in every round.

    Every round runs every arm once, beginning with the next one each time, forwards and backwards
    in turn: what drifts or lingers, drifts for all. Processor time does not count what other
    processes take; with one thread and no waiting it is the time of the step. Every arm of a round
    draws the same random numbers. The heap is kept (`keep_heap`).

    Args:
        rounds: timed rounds, at least 2.
        warmup: rounds before them, not timed.
        tick: called after each round.
    """
    keep_heap()
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    try:
        for number in range(-warmup, rounds):
            start = number % len(names)
            order = names[start:] + names[:start]
            for name in order if number % 2 else reversed(order):
                torch.manual_seed(seed + number)
                gc.collect()
                begin = time.process_time()
                arms[name]()
                seconds = time.process_time() - begin
                if number >= 0:
                    times[name].append(seconds)
            tick()
    finally:
        gc.unfreeze()
    return {name: tuple(found) for name, found in times.items()}


def ratio(arm: Sequence[float], to: Sequence[float]) -> Ratio:
    """``arm`` over ``to``, both from the same rounds."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(arm, to, strict=True)], n=4, method="inclusive"
    )
    return Ratio(median, low, high)
