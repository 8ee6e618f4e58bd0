"""Writing broken on purpose, each time in a way that other libraries do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from actckpt.checkpoint import commit, files, retention
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files, Sink
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import SAVING, step_name
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.resuming.directory import RunDirectory

Patch = pytest.MonkeyPatch


def overwrite_in_place(mp: Patch) -> None:
    """The newest checkpoint's own files are written anew."""

    @contextmanager
    def writing(self: Files, path: str) -> Iterator[Sink]:
        fd = self.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield Sink(self.calls, fd)
            self.calls.fsync(fd)
        finally:
            self.close(fd)

    def name(fs: Files, directory: str, step: int) -> str:
        found = discover(fs, directory).checkpoints
        return found[0].path.name if found else step_name(step)

    make_directory = Files.make_directory

    def make(self: Files, path: str) -> None:
        with suppress(FileExistsError):
            make_directory(self, path)

    mp.setattr(Files, "writing", writing)
    mp.setattr(Files, "make_directory", make)
    mp.setattr(commit, "free_name", name)
    mp.setattr(commit, "unique", lambda prefix, name: name)


def delete_before_commit(mp: Patch) -> None:
    """Room is made for the new checkpoint first."""
    check = commit.check_space

    def deleting(fs: Files, directory: str, snapshot: Snapshot, stored_bytes: int) -> None:
        retention.retire(fs, directory, discover(fs, directory).checkpoints)
        check(fs, directory, snapshot, stored_bytes)

    mp.setattr(commit, "check_space", deleting)


class _Kept:
    """System calls that only keep what is written."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, fd: int, data: memoryview) -> int:
        self.data += data
        return len(data)

    def write_back(self, fd: int, offset: int, count: int) -> None:
        pass


class _Held:
    """Files that are only held in memory."""

    def __init__(self) -> None:
        self.held: dict[str, _Kept] = {}

    @contextmanager
    def writing(self, path: str) -> Iterator[Sink]:
        kept: Any = _Kept()
        yield Sink(kept, -1)
        self.held[path] = kept


def manifest_first(mp: Patch) -> None:
    """What the manifest vouches for is written after it."""
    write = commit._write

    def reversed_write(fs: Files, *args: Any) -> tuple[Manifest, FileEntry]:
        held: Any = _Held()
        written = write(held, *args)
        for path, kept in reversed(held.held.items()):
            with fs.writing(path) as sink:
                sink.write(kept.data)
        return written

    mp.setattr(commit, "_write", reversed_write)


def swallowed_error(mp: Patch) -> None:
    """The device says that it could not store a file, and nobody listens."""
    again = files._again

    def deaf(call: Callable[..., Any], *args: Any) -> Any:
        if getattr(call, "name", "") != "fsync":
            return again(call, *args)
        with suppress(OSError):
            return again(call, *args)

    mp.setattr(files, "_again", deaf)


def no_fsync_of_the_parent(mp: Patch) -> None:
    """The new name is left to the file system."""
    _without_sync(mp, lambda path: SAVING not in path)


def no_fsync_of_the_new_directory(mp: Patch) -> None:
    """The names of the new files are left to the file system."""
    _without_sync(mp, lambda path: SAVING in path)


def _without_sync(mp: Patch, skipped: Callable[[str], bool]) -> None:
    sync = Files.sync_directory
    mp.setattr(
        Files, "sync_directory", lambda self, path: None if skipped(path) else sync(self, path)
    )


def no_fsync_of_files(mp: Patch) -> None:
    """The content of new files is left to the file system."""

    @contextmanager
    def writing(self: Files, path: str) -> Iterator[Sink]:
        fd = self.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        yield Sink(self.calls, fd)
        self.close(fd)

    mp.setattr(Files, "writing", writing)


def no_fsync_on_taking_up(mp: Patch) -> None:
    """What the last writer may not have come to is left to luck."""
    acquire, sync = RunDirectory._acquire, Files.sync_directory

    def without(self: RunDirectory) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(
                Files, "sync_directory", lambda fs, p: None if p == self.path else sync(fs, p)
            )
            acquire(self)

    mp.setattr(RunDirectory, "_acquire", without)


def deleted_in_sight(mp: Patch) -> None:
    """An old checkpoint loses file after file under its own name."""
    mp.setattr(Files, "rename", _rename_unless_retired(Files.rename))
    mp.setattr(retention, "unique", lambda prefix, name: name)


def _rename_unless_retired(rename: Callable[..., None]) -> Callable[..., None]:
    return lambda self, a, b: None if a == b else rename(self, a, b)


def write_taken_for_whole(mp: Patch) -> None:
    """How much a write has written is not looked at."""

    def write(self: Sink, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.written_bytes += memoryview(data).nbytes
        self._calls.write(self._fd, memoryview(data).cast("B"))

    mp.setattr(Sink, "write", write)
