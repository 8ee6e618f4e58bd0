"""How long a rank waits for others, and what is said meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import KeysView
from dataclasses import dataclass

from actckpt.errors import CheckpointError

logger = logging.getLogger("actckpt")

_LEAST_S, _MOST_S = 0.001, 0.05
# so often one looks whether it waits in vain
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a rank waits for others.

    Args:
        silent_s: one that has not beaten for so long is taken for dead.
        most_s: for one that beats, and does not come.
    """

    silent_s: float = 10.0
    most_s: float = 1800.0


class RankSilentError(CheckpointError):
    """Another rank did not come.

    Attributes:
        ranks: which.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class Waiting:
    """How long one waits for others, and what is said meanwhile."""

    def __init__(self, patience: Patience, heard: KeysView[int]) -> None:
        self._patience, self._heard = patience, heard
        self._begin_s, self._pause_s = time.monotonic(), _LEAST_S
        self._looked_s = self._begin_s
        self._warned = False

    def is_to_look(self) -> bool:
        """Whether it is time to look where those are that are waited for."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return False
        self._looked_s = now_s
        return True

    def pause(self, awaited: set[int]) -> None:
        """A little longer than before.

        Raises:
            RankSilentError: it has been long enough.
        """
        waited_s = time.monotonic() - self._begin_s
        if waited_s > self._patience.silent_s and not self._warned:
            self._warned = True
            if never := sorted(awaited - self._heard):
                logger.warning(
                    "actckpt: waiting for rank %s, of which nothing was heard yet: where many "
                    "ranks train together, every one of them makes a Checkpointer and calls it",
                    listed(never),
                )
        if waited_s > self._patience.most_s:
            raise RankSilentError(
                f"rank {listed(sorted(awaited))} did not come within "
                f"{self._patience.most_s:g} s, though it runs: every rank has to make the same "
                "calls in the same order",
                sorted(awaited),
            )
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _MOST_S)


def listed(ranks: list[int]) -> str:
    """Of ranks, the first few."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
