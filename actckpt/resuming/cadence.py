"""When a checkpoint is due.

References:
    Young, A first order approximation to the optimum checkpoint interval, 1974.
    Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006, eq. 8.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*")


class Cadence:
    """Says after each step whether to save.

    Args:
        every: a number of steps, a duration such as "10min", "30s" or "1.5h", None for never, or
            "auto": the interval that loses the least time to saving and to repeating what a failure
            undid, from what a save was measured to cost. The first step measures.
        mtbf: mean time between failures, a duration, for "auto".
        clock: seconds, from any beginning.

    Raises:
        ValueError: ``every`` or ``mtbf`` is none of these.
    """

    def __init__(
        self,
        every: int | str | None,
        mtbf: str = "24h",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._steps: int | None = None
        self._seconds: float | None = None
        self._auto = every == "auto"
        self._cost_s: float | None = None
        self._durable_s = 0.0
        seconds = _seconds(mtbf)
        if not seconds:
            raise ValueError(f'mtbf must be a duration such as "24h"; found {mtbf!r}')
        self._mtbf_s = seconds
        if isinstance(every, str):
            self._seconds = _seconds(every)
        elif type(every) is int and every >= 1:
            self._steps = every
        known = self._auto or self._seconds is not None or self._steps is not None
        if every is not None and not known:
            raise ValueError(
                'every must be a number of steps, a duration such as "10min", "auto", or None; '
                f"found {every!r}"
            )
        self._last = clock()

    @property
    def interval_s(self) -> float | None:
        """Time from save to save; None where it is counted in steps, never, or not known yet.

        For "auto" sqrt(2 × cost × MTBF), where the cost is the time that training stood still; and
        no shorter than a save takes to be durable.
        """
        if not self._auto or self._cost_s is None:
            return self._seconds
        return max(math.sqrt(2 * self._cost_s * self._mtbf_s), self._durable_s)

    def due(self, step: int) -> bool:
        """Whether a save is due after optimizer step number ``step``."""
        if self._steps is not None:
            return step % self._steps == 0
        interval_s = self.interval_s
        if interval_s is None:
            return self._auto
        return self._clock() - self._last >= interval_s

    def began(self, cost_s: float | None) -> None:
        """A save has begun; the interval begins.

        Args:
            cost_s: training stood still for so long; None where it was no save of the usual kind.
        """
        self._last = self._clock()
        if cost_s is not None:
            self._cost_s = cost_s

    def ended(self, durable_s: float) -> None:
        """A save took so long until it was durable."""
        self._durable_s = durable_s

    def restart(self) -> None:
        """The interval begins without a save."""
        self._last = self._clock()


def _seconds(text: object) -> float | None:
    found = _DURATION.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else float(found[1]) * _UNITS[found[2]]
