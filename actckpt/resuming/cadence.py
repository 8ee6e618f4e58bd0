"""When a checkpoint is due."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*")


class Cadence:
    """Says after each step whether to save.

    Args:
        every: a number of steps, a duration such as "10min", "30s" or "1.5h", or None for never.
        clock: seconds, from any beginning.

    Raises:
        ValueError: ``every`` is none of these.
    """

    def __init__(
        self, every: int | str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._steps: int | None = None
        self._seconds: float | None = None
        if isinstance(every, str) and (found := _DURATION.fullmatch(every)):
            self._seconds = float(found[1]) * _UNITS[found[2]]
        elif type(every) is int and every >= 1:
            self._steps = every
        elif every is not None:
            raise ValueError(
                'every must be a number of steps, a duration such as "10min", or None; '
                f"found {every!r}"
            )
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether a save is due after optimizer step number ``step``."""
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and self._clock() - self._last >= self._seconds

    def saved(self) -> None:
        """A save has ended: a duration begins again."""
        self._last = self._clock()
