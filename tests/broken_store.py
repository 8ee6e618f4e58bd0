"""An object store whose network goes: before each call that changes something, and from then on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

import actckpt
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import MANIFEST
from actckpt.checkpoint.object_store import ObjectStore


class Broken(MemoryFileSystem):  # type: ignore[misc]
    """Fails at one of the calls that change something, and from then on."""

    protocol = "broken"
    store = MemoryFileSystem.store
    pseudo_dirs = MemoryFileSystem.pseudo_dirs
    left = 10_000

    def _count(self) -> None:
        Broken.left -= 1
        if Broken.left < 0:
            raise ConnectionError("the network is gone")

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().put_file(*args, **kwargs)

    def pipe_file(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().pipe_file(*args, **kwargs)

    def rm(self, path: Any, recursive: bool = False, **_: Any) -> None:
        # a folder goes file by file, and what makes it a checkpoint may be the last of them
        files = self.find(path) if recursive else [path]
        for file in sorted(files, key=lambda f: f.endswith(MANIFEST)):
            self._count()
            super().rm(file)


fsspec.register_implementation("broken", Broken)


def broken_uploads(
    first: Checkpoint, second: Checkpoint, folder: Path
) -> Iterator[tuple[ObjectStore, tuple[int, ...], bool]]:
    """A store in which an upload broke off, later each time; the last one did not.

    One checkpoint lies there whole, and another was to take its place. Whatever shows is fetched
    and verified.

    Yields:
        The store, the steps that show, and whether all was done.
    """
    for calls in range(200):
        MemoryFileSystem.store.clear()
        Broken.left = 10_000
        store = ObjectStore("broken://bucket/a", "full")
        store.upload(first)
        Broken.left = calls
        with suppress(actckpt.CheckpointError):
            store.upload(second)
            store.retire(first.path.name)
        whole = Broken.left >= 0
        Broken.left = 10_000
        found, skipped = store.stored()
        assert not skipped
        for each in found:
            back = folder / f"back-{calls}-{each.manifest.step}"
            back.mkdir()
            store.fetch(each, Files(), str(back)).verify()
        yield store, tuple(each.manifest.step for each in found), whole
        if whole:
            return
    raise AssertionError("no upload was ever whole")
