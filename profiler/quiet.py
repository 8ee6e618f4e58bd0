"""Torch's profiler without its start and stop lines on standard error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = (b"USDT:", b"Memory block of unknown size")


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Drops the profiler's own lines from standard error and passes all others on.

    Its log level can only be set before torch is imported (KINETO_LOG_LEVEL), so the lines are
    caught at the file descriptor, for the microseconds of a start or a stop.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not any(noise in line for noise in _NOISE):
                    os.write(2, line)
