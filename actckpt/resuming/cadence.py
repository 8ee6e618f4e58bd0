"""When a checkpoint is due.

References:
    Young, A first order approximation to the optimum checkpoint interval, 1974.
    Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006, eq. 8.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from actckpt.errors import ArgumentError
from actckpt.units import parse_seconds

Every: TypeAlias = int | str | Sequence[int] | Callable[[int], bool] | None


class Cadence:
    """Says after each step whether to save.

    Args:
        every: a number of steps, a duration such as "10 minutes", "30s", "1.5h" or "1d", None for
            never, or "auto": the interval that loses the least time to saving and to repeating what
            a failure undid, from what a save was measured to cost. The first step measures. Or
            certain steps as a list; "doubling", 1, 2, 4, …; "epoch", the end of each; or a function
            that is asked after each step, given its number.
        mtbf: mean time between failures, a duration, for "auto".
        clock: seconds, from any beginning.

    Raises:
        ArgumentError: ``every`` or ``mtbf`` is none of these.
    """

    def __init__(
        self,
        every: Every,
        mtbf: str = "24h",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._steps: int | None = None
        self._seconds: float | None = None
        self._auto = every == "auto"
        self._cost_s: float | None = None
        self._durable_s = 0.0
        seconds = parse_seconds(mtbf) if isinstance(mtbf, str) else None
        if not seconds:
            raise ArgumentError(f'mtbf must be a duration such as "24h"; found {mtbf!r}')
        self._mtbf_s = seconds
        if isinstance(every, str):
            self._seconds = parse_seconds(every)
        elif type(every) is int and every >= 1:
            self._steps = every
        self._asked = _asked(every)
        self.by_epoch = every == "epoch"
        counted = self._steps is not None or self._asked is not None or self.by_epoch
        if every is not None and not counted and not self.by_clock:
            raise ArgumentError(
                'every must be a number of steps, a duration such as "10 minutes" or "1d", "auto", '
                'steps as a list, "doubling", "epoch", a function of the step, or None; found '
                f"{every!r}{_hint(every)}"
            )
        self._last = clock()

    @property
    def by_clock(self) -> bool:
        """Whether time says when."""
        return self._auto or self._seconds is not None

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
        if self._asked is not None:
            return bool(self._asked(step))
        interval_s = self.interval_s
        if interval_s is None:
            return self._auto
        return self._clock() - self._last >= interval_s

    def passed(self, step: int, last: int | None) -> bool:
        """Whether a save was due since the last one, that of step ``last``; None was none."""
        if self._steps is None or last is None:
            return last is None or self.due(step)
        return step // self._steps > last // self._steps

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


def _asked(every: Every) -> Callable[[int], bool] | None:
    """Says of a step whether it is one, where neither a number nor the clock does."""
    if every == "doubling":
        return lambda step: step > 0 and step & (step - 1) == 0
    if callable(every):
        return every
    if isinstance(every, str) or not isinstance(every, Sequence):
        return None
    if not every or not all(type(step) is int and step >= 1 for step in every):
        raise ArgumentError(f"every as a list has steps, each at least 1; found {every!r:.80}")
    return frozenset(every).__contains__


def _hint(every: object) -> str:
    """What to write instead of what people ask for most, where that is none of these."""
    words = every.lower().split() if isinstance(every, str) else []
    if words and words[-1] in ("epoch", "epochs"):
        return (
            '. For a save at the end of each epoch of run.steps(...) pass every="epoch"; in a loop '
            "of your own every=None, and call run.save() there"
        )
    if words and words[0].isdigit() and words[-1] in ("step", "steps", words[0]):
        return f". Steps are a number alone: every={words[0]}"
    return ""
