"""Where the processes that are harmed run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = "/dev/shm"


@contextmanager
def empty_place() -> Iterator[Path]:
    """An empty directory, deleted afterwards.

    In memory where there is a file system for it: what a device would have kept is simulated, and
    thousands of real fsyncs take most of an hour.
    """
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="actckpt-faults-", dir=memory) as made:
        yield Path(made)
