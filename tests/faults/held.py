"""Saves in the background that write nothing before training has gone on."""

from __future__ import annotations

import threading
from typing import Any

from actckpt.checkpoint.system_calls import SystemCalls

WRITER = "actckpt-save"


class Held:
    """System calls that each writing thread makes none of until it may.

    What a thread reads of a state is then read after the next optimizer step, and the order of all
    calls is the same every time, whichever thread makes them.
    """

    def __init__(self, calls: SystemCalls) -> None:
        self._calls = calls
        self._allowed = threading.Semaphore(0)
        self._this_thread = threading.local()

    def go_on(self, saves: int) -> None:
        """Lets so many more threads begin."""
        self._allowed.release(saves)

    def __getattr__(self, name: str) -> Any:
        writer = threading.current_thread().name == WRITER
        if writer and not hasattr(self._this_thread, "allowed"):
            self._allowed.acquire()
            self._this_thread.allowed = True
        return getattr(self._calls, name)
