"""A folder that appears whole, with a manifest of checksums, or not at all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from actckpt.checkpoint.at_once import at_once
from actckpt.checkpoint.documents import sealed, unsealed
from actckpt.checkpoint.files import Files, Sink
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.names import unique
from actckpt.checkpoint.verification import checked
from actckpt.errors import CheckpointError, CheckpointFormatError, WeightsExportError
from actckpt.units import GIGABYTES

logger = logging.getLogger("actckpt")

MANIFEST = "actckpt-export.json"
# no name of a Checkpointer's: one that writes into the parent deletes what has such a name
EXPORTING = ".exporting-"
KIND = "export"
VERSION = 1


@dataclass(slots=True)
class Folder:
    """A folder being written, which nobody else looks into yet.

    Args:
        path: its temporary one.
        entries: what is in it, of the files that were hashed as they were written.
    """

    files: Files
    path: str
    entries: dict[str, FileEntry] = field(default_factory=dict)

    @contextmanager
    def writing(self, name: str) -> Iterator[Sink]:
        """A new file, hashed as it is written, durable when the block ends."""
        with self.files.writing(f"{self.path}/{name}") as sink:
            yield sink
        self.entries[name] = FileEntry(sink.written_bytes, sink.checksum)

    def take_in(self) -> None:
        """Hashes and makes durable what a library has written here by itself."""
        for name in _names(self.files, self.path):
            if name not in self.entries:
                where = f"{self.path}/{name}"
                # the device writes while the bytes, which are in memory still, are hashed
                at_once(_done, (partial(self._hash, name), partial(self.files.sync_file, where)))

    def _hash(self, name: str) -> None:
        with self.files.reading(f"{self.path}/{name}") as source:
            source.drain()
            self.entries[name] = FileEntry(source.read_bytes, source.checksum)


def write_folder(
    files: Files,
    path: Path,
    needed_bytes: int,
    write: Callable[[Folder], Mapping[str, Any]],
) -> tuple[dict[str, FileEntry], Mapping[str, Any]]:
    """The files of a new folder, all durable and checked, and what ``write`` gave for the manifest.

    Args:
        path: absolute; nothing may be there.
        needed_bytes: an estimate; less free space is refused before anything is written.
        write: fills the folder, and reads it back by the code of whoever will.

    Raises:
        WeightsExportError: nothing is there afterwards, for the reason that is given.
    """
    final = str(path)
    parent, name = os.path.split(final)
    try:
        refuse_existing(files, path)
        files.make_directories(parent)
        _remove_left(files, parent, name)
        free = files.free_bytes(parent)
        if free < needed_bytes:
            raise WeightsExportError(
                f"the export needs {GIGABYTES.text(needed_bytes)} in {parent}; "
                f"{GIGABYTES.text(free)} are free: free some, or export elsewhere"
            )
        temporary = f"{parent}/{unique(EXPORTING, name)}"
        files.make_directory(temporary)
        lock = -1
        try:
            # where there are no locks, nobody gets one to remove it either
            with suppress(OSError):
                lock = files.lock_directory(temporary)
            folder = Folder(files, temporary)
            facts = write(folder)
            folder.take_in()
            entries = dict(folder.entries)
            with folder.writing(MANIFEST) as sink:
                listed = {k: _members(e) for k, e in sorted(entries.items())}
                sink.write(sealed(KIND, VERSION, {**facts, "files": listed}))
            _sync_folders(files, temporary)
            verify_folder(files, temporary)
            files.rename(temporary, final)
        except BaseException:
            _abandon(files, temporary)
            raise
        finally:
            if lock >= 0:
                files.close_whatever(lock)
    except CheckpointError as error:
        raise WeightsExportError(
            f"{path} was written and did not read back as written: {error}. Nothing is left; do "
            "not trust this file system"
        ) from error
    except (OSError, SafetensorError) as error:
        raise WeightsExportError(
            f"{path} could not be written: {error}. Nothing is left; remove the cause, or export "
            "elsewhere"
        ) from error
    try:
        files.sync_directory(parent)
    except OSError as error:
        raise WeightsExportError(
            f"{path} is there and whole, and a loss of power may take its name away: {error}"
        ) from error
    return entries, facts


def refuse_existing(files: Files, path: Path) -> None:
    """A place that is taken.

    Raises:
        WeightsExportError: something is there, or it cannot be told.
    """
    try:
        if files.status(str(path)) is None:
            return
    except OSError as error:
        raise WeightsExportError(f"{path} cannot be looked at: {error}") from error
    raise WeightsExportError(f"{path} exists: delete it, or export to another folder")


def verify_folder(files: Files, path: str) -> dict[str, Any]:
    """The manifest of an exported folder, every byte of whose files is as it was written.

    Raises:
        CheckpointFormatError: one is missing or damaged; it is named.
    """
    where = f"{path}/{MANIFEST}"
    try:
        with files.reading(where) as source:
            data = unsealed(source.read(source.size_bytes), KIND, (VERSION,), where)
    except (OSError, EOFError) as error:
        raise CheckpointFormatError(
            f"{where} cannot be read: {error}. Give a folder that actckpt.export has made"
        ) from error
    for name, entry in data["files"].items():
        with checked(files, f"{path}/{name}", FileEntry(**entry)):
            pass
    return data


def _done(work: Callable[[], None]) -> None:
    work()


def _names(files: Files, path: str, below: str = "") -> Iterator[str]:
    for name in files.names(f"{path}/{below}"):
        if files.is_directory(f"{path}/{below}{name}"):
            yield from _names(files, path, f"{below}{name}/")
        else:
            yield f"{below}{name}"


def _sync_folders(files: Files, path: str) -> None:
    for name in files.names(path):
        if files.is_directory(f"{path}/{name}"):
            _sync_folders(files, f"{path}/{name}")
    files.sync_directory(path)


def _members(entry: FileEntry) -> dict[str, Any]:
    return {"size_bytes": entry.size_bytes, "checksum": entry.checksum}


def _remove_left(files: Files, parent: str, name: str) -> None:
    """Deletes what killed exports to the same place left; one that is running has its lock."""
    left = re.compile(rf"{re.escape(EXPORTING + name)}-\d+-[0-9a-f]{{8}}")
    try:
        found = [each for each in files.names(parent) if left.fullmatch(each)]
    except PermissionError:
        return  # one may write into a directory that one may not list
    for each in found:
        try:
            lock = files.lock_directory(f"{parent}/{each}")
        except OSError:
            continue
        logger.info("actckpt: removing %s/%s, left by a process that ended", parent, each)
        try:
            _abandon(files, f"{parent}/{each}")
        finally:
            files.close_whatever(lock)


def _abandon(files: Files, temporary: str) -> None:
    try:
        files.remove_tree(temporary)
    except OSError as error:
        logger.warning("actckpt: %s could not be removed: %s", temporary, error)
