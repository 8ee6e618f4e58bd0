"""Whole file operations on top of single system calls: complete, hashed, made durable."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import xxhash

from actckpt.checkpoint.at_once import at_once
from actckpt.checkpoint.digest import BLOCK_BYTES, Digest
from actckpt.checkpoint.system_calls import OperatingSystem, SystemCalls

T = TypeVar("T")

# hashed while it is in the cache, then written
PIECE_BYTES = 1 << 20
# what is written goes on its way to the device while the rest is still being hashed
WRITE_BACK_BYTES = 8 << 20
# of a file that is read to be hashed; few, for training goes on beside
READERS = min(4, os.cpu_count() or 1)


class Sink:
    """A new file being written; counts and hashes what passes."""

    def __init__(self, calls: SystemCalls, fd: int) -> None:
        self._calls = calls
        self._fd = fd
        self._digest = Digest()
        self._under_way_bytes = 0
        self.written_bytes = 0

    @property
    def checksum(self) -> str:
        """Of everything written so far."""
        return self._digest.checksum

    @property
    def blocks(self) -> bytes:
        """The digests of its blocks, as `Digest.blocks`."""
        return self._digest.blocks

    def write(self, data: bytes | memoryview) -> None:
        """Writes all of ``data``."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._digest.update(piece)
            self.written_bytes += len(piece)
            while piece:
                piece = piece[_written(_again(self._calls.write, self._fd, piece)) :]
            if (fresh := self.written_bytes - self._under_way_bytes) >= WRITE_BACK_BYTES:
                _again(self._calls.write_back, self._fd, self._under_way_bytes, fresh)
                self._under_way_bytes = self.written_bytes


class Source:
    """A file being read from its beginning; counts and hashes what passes."""

    def __init__(self, calls: SystemCalls, fd: int, size_bytes: int) -> None:
        self._calls = calls
        self._fd = fd
        self._digest = Digest()
        self.size_bytes = size_bytes
        self.read_bytes = 0

    @property
    def checksum(self) -> str:
        """Of everything read so far."""
        return self._digest.checksum

    def read_into(self, buffer: memoryview) -> None:
        """Fills ``buffer``.

        Raises:
            EOFError: the file ends before.
        """
        view = buffer.cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self.read_at(self.read_bytes, piece)
            self._digest.update(piece)
            self.read_bytes += len(piece)

    def read_at(self, offset: int, left: memoryview) -> None:
        """Fills ``left`` from a place of the file; neither counts nor hashes.

        Raises:
            EOFError: the file ends before.
        """
        while left:
            count = _again(self._calls.readinto, self._fd, left, offset)
            if count <= 0:
                raise EOFError(f"ends before byte {offset + len(left)}")
            left, offset = left[count:], offset + count

    def read(self, count: int) -> bytearray:
        """The next ``count`` bytes.

        Raises:
            EOFError: there are fewer.
        """
        if count > self.size_bytes - self.read_bytes:
            raise EOFError(f"has {self.size_bytes} bytes, {self.read_bytes + count} were expected")
        buffer = bytearray(count)
        self.read_into(memoryview(buffer))
        return buffer

    def drain(self) -> None:
        """Reads and hashes what is left; of whole blocks several at once."""
        self._pass(min(self._digest.missing_bytes, self.size_bytes - self.read_bytes))
        blocks = range(self.read_bytes, self.size_bytes - BLOCK_BYTES + 1, BLOCK_BYTES)
        if len(blocks) > 1:
            digests = [b""] * len(blocks)
            shares = [blocks[k::READERS] for k in range(READERS)]
            for k, found in enumerate(at_once(self._blocks_at, shares)):
                digests[k::READERS] = found
            for digest in digests:
                self._digest.append(digest)
                self.read_bytes += BLOCK_BYTES
        self._pass(self.size_bytes - self.read_bytes)

    def _pass(self, count: int) -> None:
        buffer = memoryview(bytearray(min(PIECE_BYTES, count)))
        end = self.read_bytes + count
        while self.read_bytes < end:
            self.read_into(buffer[: end - self.read_bytes])

    def _blocks_at(self, offsets: Iterable[int]) -> list[bytes]:
        """The digests of some blocks."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        found = []
        for offset in offsets:
            digest = xxhash.xxh3_128()
            for at in range(offset, offset + BLOCK_BYTES, PIECE_BYTES):
                self.read_at(at, buffer)
                digest.update(buffer)
            found.append(bytes(digest.digest()))
        return found


class Files:
    """File operations that either happen completely or raise OSError."""

    def __init__(self, calls: SystemCalls | None = None) -> None:
        self.calls: SystemCalls = OperatingSystem() if calls is None else calls

    @contextmanager
    def writing(self, path: str) -> Iterator[Sink]:
        """A new file; on the device when the block ends without an error."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = _again(self.calls.open, path, flags, 0o666)
        try:
            yield Sink(self.calls, fd)
            _again(self.calls.fsync, fd)
        except BaseException:
            self.close_whatever(fd)
            raise
        self.close(fd)

    def open_to_append(self, path: str) -> int:
        """A descriptor for `append`, of a file that is made if there is none; `close` it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return _again(self.calls.open, path, flags, 0o666)

    def append(self, fd: int, data: bytes) -> None:
        """Writes all of ``data`` behind what is there; nothing says when the device has it."""
        left = memoryview(data)
        while left:
            left = left[_written(_again(self.calls.write, fd, left)) :]

    @contextmanager
    def reading(self, path: str) -> Iterator[Source]:
        """An existing regular file that is no symbolic link."""
        # a pipe of that name must not block
        fd = _again(self.calls.open, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0)
        try:
            status = _again(self.calls.fstat, fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"not a regular file: {path}")
            yield Source(self.calls, fd, status.st_size)
        finally:
            self.close_whatever(fd)

    def open_lock(self, path: str) -> int:
        """A descriptor of an empty file that stays; `close` it."""
        return _again(self.calls.open, path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def lock(self, fd: int) -> None:
        """Locks a descriptor's file against everybody else who locks it, or raises at once."""
        _again(self.calls.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lock_directory(self, path: str) -> int:
        """A descriptor of a directory that nobody else has locked, and which is now; `close` it.

        Raises:
            OSError: somebody has, or its file system has no such locks.
        """
        fd = _again(self.calls.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, 0)
        try:
            self.lock(fd)
        except BaseException:
            self.close_whatever(fd)
            raise
        return fd

    def sync_file(self, path: str) -> None:
        """Makes durable what somebody else has written into a file."""
        fd = _again(self.calls.open, path, os.O_RDONLY | os.O_NOFOLLOW, 0)
        try:
            _again(self.calls.fsync, fd)
        finally:
            self.close_whatever(fd)

    def sync_directory(self, path: str) -> None:
        """Makes the names in a directory durable."""
        fd = _again(self.calls.open, path, os.O_RDONLY | os.O_DIRECTORY, 0)
        try:
            _again(self.calls.fsync, fd)
        finally:
            self.close_whatever(fd)

    def make_directory(self, path: str) -> None:
        """A new directory."""
        _again(self.calls.mkdir, path, 0o777)

    def make_directories(self, path: str) -> None:
        """A directory, and those it lies in, as far as they do not exist; durable."""
        parent = os.path.dirname(path) or "."
        if self.status(path) is None:
            self.make_directories(parent)
            with suppress(FileExistsError):  # another process was faster
                self.make_directory(path)
            self.sync_directory(parent)
        else:
            # who made it may have been killed before this; who may not look, has not made it
            with suppress(PermissionError):
                self.sync_directory(parent)

    def rename(self, source: str, target: str) -> None:
        """Another name for a file or directory. The caller makes sure that it is not taken."""
        _again(self.calls.rename, source, target)

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        return sorted(_again(self.calls.listdir, path))

    def status(self, path: str) -> os.stat_result | None:
        """What is there, without following a link; None if nothing is."""
        try:
            return _again(self.calls.lstat, path)
        except FileNotFoundError:
            return None

    def is_directory(self, path: str) -> bool:
        """Whether a real directory, no link to one, is there."""
        status = self.status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def free_bytes(self, path: str) -> int:
        """What can still be written to the file system of ``path``."""
        return _again(self.calls.free_bytes, path)

    def remove_tree(self, path: str) -> None:
        """Deletes a directory of files, or a file or link itself; nothing there is no error."""
        if not self.is_directory(path):
            if self.status(path) is not None:
                _again(self.calls.unlink, path)
            return
        for name in self.names(path):
            self.remove_tree(f"{path}/{name}")
        _again(self.calls.rmdir, path)

    def close(self, fd: int) -> None:
        """Closes a descriptor."""
        # interrupted or not, the descriptor is gone, and another thread may have it by now
        with suppress(InterruptedError):
            self.calls.close(fd)

    def close_whatever(self, fd: int) -> None:
        """Closes a descriptor of which nothing was promised that an error could break."""
        with suppress(OSError):
            self.calls.close(fd)


def _written(count: int) -> int:
    if count <= 0:
        raise OSError("a write wrote nothing and reported no error")
    return count


def _again(call: Callable[..., T], *args: Any) -> T:
    """The result of a system call, made again for as long as a signal interrupts it."""
    while True:
        try:
            return call(*args)
        except InterruptedError:
            continue
