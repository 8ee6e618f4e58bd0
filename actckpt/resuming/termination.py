"""SIGTERM as a wish that is granted between two steps, where the state is whole."""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from types import FrameType

logger = logging.getLogger("actckpt")

# what a shell reports of a process that SIGTERM ended
_STATUS = 128 + signal.SIGTERM


class Termination:
    """Notes the first SIGTERM; a second one, or one to a forked child, acts as if this were not.

    Args:
        owner: who asks; when it is gone, signals are no longer kept from anybody.
    """

    def __init__(self, owner: object) -> None:
        self.asked = False
        self._owner = weakref.ref(owner)
        self._process = 0
        self._warned = False
        self._previous: object = None

    def watch(self) -> None:
        """From now on; only a main thread can, and a process that ignores SIGTERM goes on so."""
        if self._process == os.getpid():
            return
        if threading.current_thread() is not threading.main_thread():
            if not self._warned:
                self._warned = True
                logger.warning(
                    "actckpt: SIGTERM will not save: only a main thread may handle signals, and "
                    "this loop runs in another. Begin it there, or pass on_sigterm=None"
                )
            return
        previous: object = signal.getsignal(signal.SIGTERM)
        # a run that was dropped without being closed has left its handler
        while isinstance(other := getattr(previous, "__self__", None), Termination):
            if other._process == os.getpid() and other._owner() is not None:
                break
            previous = other._previous
        if previous is signal.SIG_IGN or previous is None:
            return
        self._previous, self._process = previous, os.getpid()
        signal.signal(signal.SIGTERM, self._note)

    def unwatch(self) -> None:
        """Puts back what was there, unless somebody else has come after."""
        mine = self._process == os.getpid() and signal.getsignal(signal.SIGTERM) == self._note
        if mine and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]
        self._process = 0

    def end(self) -> None:
        """Ends the process as the signal asked, now that all is saved.

        A handler that was there before gets the signal instead.

        Raises:
            SystemExit: with the status 143.
        """
        self.asked = False
        self.unwatch()
        if callable(self._previous):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise SystemExit(_STATUS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.asked and self._process == os.getpid() and self._owner() is not None:
            self.asked = True
            return
        signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
