"""What the patched forwards of a thread belong to."""

from __future__ import annotations

import threading
from typing import Any


class _Current(threading.local):
    """What the patched forwards of this thread belong to: a forward pass, a replay, or nothing."""

    run: Any = None


CURRENT = _Current()
