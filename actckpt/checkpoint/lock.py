"""One writer per directory: an advisory lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import LOCK
from actckpt.errors import CheckpointError

_HELD: weakref.WeakSet[DirectoryLock]


class DirectoryLock:
    """The right to write into one directory of checkpoints, until `release`.

    Raises:
        CheckpointError: somebody else has it, in this process or another.
    """

    def __init__(self, files: Files, directory: str) -> None:
        self._files = files
        self._fd = files.open_lock(f"{directory}/{LOCK}")
        try:
            files.lock(self._fd)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise CheckpointError(
                f"{directory} is being written by another Checkpointer, in this process or another "
                "one: stop or close that one, wait until its last save is written, or use another "
                "directory"
            ) from error
        _HELD.add(self)

    @property
    def held(self) -> bool:
        """Whether it is this process's: not released, and not that of a parent process."""
        return self._fd >= 0

    def release(self) -> None:
        """Lets others write; does nothing the second time."""
        fd, self._fd = self._fd, -1
        _HELD.discard(self)
        if fd >= 0:
            self._files.close_whatever(fd)

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, and must end with the parent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # where an interpreter ends, a module's own names are gone
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            self._fd = -1
            close(fd)


_HELD = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


# a data loader's worker would keep a killed run's directory locked for as long as it lives
os.register_at_fork(after_in_child=_forget_all)
