"""What the solver prints past its own switches does not reach standard output.

HiGHS 1.12 prints a line of its debugging with printf, whatever its options say
(github.com/jump-dev/HiGHS.jl/issues/312), so the file descriptor is turned away for a while.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scipy import optimize

_OF_HIGHS = b"Highs"


class _Aside:
    """Standard output, turned to a file as long as somebody solves; others' output comes after."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = -1
        self._file = -1

    def begin(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            try:
                self._saved = os.dup(1)
            except OSError:  # a process without standard output
                self._saved = -1
                return
            self._file = _file()
            _flush()
            os.dup2(self._file, 1)

    def end(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth or self._saved < 0:
                return
            _flush()
            os.dup2(self._saved, 1)
            os.lseek(self._file, 0, os.SEEK_SET)
            found = b"".join(iter(lambda: os.read(self._file, 1 << 16), b""))
            os.close(self._file)
            os.close(self._saved)
            # of other threads, meanwhile
            for line in found.splitlines(keepends=True):
                if not line.startswith(_OF_HIGHS):
                    os.write(1, line)


_ASIDE = _Aside()


@contextmanager
def without_solver_output() -> Iterator[None]:
    """Lines of HiGHS do not reach the process's standard output; of others nothing is lost."""
    if sys.platform == "win32":  # another C library writes there
        yield
        return
    _ASIDE.begin()
    try:
        yield
    finally:
        _ASIDE.end()


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _flush() -> None:
    """C's buffer of standard output, which is not Python's."""
    library = ctypes.CDLL(None)
    name = "__stdoutp" if sys.platform == "darwin" else "stdout"
    library.fflush(ctypes.c_void_p.in_dll(library, name))


def milp(*args: Any, **kwargs: Any) -> Any:
    """As `scipy.optimize.milp`, silently."""
    with without_solver_output():
        return optimize.milp(*args, **kwargs)
