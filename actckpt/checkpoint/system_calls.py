"""The file-system calls that checkpoints are made of, and nothing around them.

Every byte that a checkpoint reads or writes goes through one object of this shape, so that a test
can put another one in its place: one that fails, is interrupted, writes less, or records.
"""

from __future__ import annotations

import fcntl
import os
import sys
from typing import Protocol


class SystemCalls(Protocol):
    """As the functions of `os`: errors are OSError, ``write`` and ``readinto`` may do less."""

    def open(self, path: str, flags: int, mode: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def write(self, fd: int, data: memoryview) -> int: ...
    def write_back(self, fd: int, offset: int, count: int) -> None: ...
    def readinto(self, fd: int, buffer: memoryview, offset: int) -> int: ...
    def fsync(self, fd: int) -> None: ...
    def flock(self, fd: int, operation: int) -> None: ...
    def fstat(self, fd: int) -> os.stat_result: ...
    def lstat(self, path: str) -> os.stat_result: ...
    def listdir(self, path: str) -> list[str]: ...
    def mkdir(self, path: str, mode: int) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def free_bytes(self, path: str) -> int: ...


class OperatingSystem:
    """The real ones."""

    def open(self, path: str, flags: int, mode: int) -> int:
        """A descriptor that programs started by this one do not inherit."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """`os.close`."""
        os.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        """How many bytes were written, perhaps fewer than given."""
        return os.write(fd, data)

    def write_back(self, fd: int, offset: int, count: int) -> None:
        """Begins to bring what was written to the device, where the system can be asked to."""
        # Linux writes dirty pages at once and drops only clean ones, which these are not
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)

    def readinto(self, fd: int, buffer: memoryview, offset: int) -> int:
        """How many bytes were read, perhaps fewer than fit; 0 at the end."""
        return os.preadv(fd, [buffer], offset)

    def fsync(self, fd: int) -> None:
        """Returns once the device has it (on macOS plain fsync does not wait for that)."""
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def flock(self, fd: int, operation: int) -> None:
        """`fcntl.flock`."""
        fcntl.flock(fd, operation)

    def fstat(self, fd: int) -> os.stat_result:
        """`os.fstat`."""
        return os.fstat(fd)

    def lstat(self, path: str) -> os.stat_result:
        """`os.lstat`: does not follow a symbolic link."""
        return os.lstat(path)

    def listdir(self, path: str) -> list[str]:
        """`os.listdir`: in no order."""
        return os.listdir(path)

    def mkdir(self, path: str, mode: int) -> None:
        """`os.mkdir`."""
        os.mkdir(path, mode)

    def rename(self, source: str, target: str) -> None:
        """`os.rename`."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """`os.unlink`."""
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        """`os.rmdir`."""
        os.rmdir(path)

    def free_bytes(self, path: str) -> int:
        """What this user can still write to the file system of ``path``."""
        found = os.statvfs(path)
        if not found.f_blocks:
            return sys.maxsize  # it does not say, as those of some networks and quotas
        # what is kept for the superuser is his
        blocks = found.f_bavail if os.geteuid() else max(found.f_bavail, found.f_bfree)
        return blocks * found.f_frsize
