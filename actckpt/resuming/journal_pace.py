"""How many of a run's steps its journal takes down: all, unless they are very short."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# of the loop's processor time; a hundredth is promised, with what is not measured
SHARE = 0.007
WINDOW = 128  # steps
MOST = 1 << 10


class Pace:
    """Which steps are taken down, by what that costs beside the steps themselves.

    At first every step, and from then on every second, fourth, ... where all of them would take
    more than `SHARE` of the loop's processor time. Random states and weights carry what went
    before: a run that is another one is seen to be by the next step that is taken down.

    Args:
        loop_clock: processor seconds of the process.
        own_clock: of the thread.
    """

    def __init__(
        self,
        loop_clock: Callable[[], float] = time.process_time,
        own_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._loop_clock = loop_clock
        self.now = own_clock
        self.every = 1
        self._own_s = self._elsewhere_s = 0.0
        self._window_s = loop_clock()
        self._steps = 0

    def takes(self, step: int) -> bool:
        """Whether a step is to be taken down."""
        return step % self.every == 0

    def spent(self, since: float) -> None:
        """So much was spent, since `now` said this."""
        self._own_s += self.now() - since

    def stepped(self, elsewhere_s: float = 0.0) -> None:
        """A step ended.

        Args:
            elsewhere_s: processor seconds that other threads have spent so far.
        """
        self._steps += 1
        if self._steps < WINDOW:
            return
        self._own_s += elsewhere_s - self._elsewhere_s
        self._elsewhere_s = elsewhere_s
        before, self._window_s = self._window_s, self._loop_clock()
        share = self._own_s / max(self._window_s - before, 1e-9)
        self._own_s, self._steps = 0.0, 0
        if share > SHARE:
            self.every = min(self.every << math.ceil(math.log2(share / SHARE)), MOST)
        elif self.every > 1 and share < SHARE / 4:
            self.every //= 2
