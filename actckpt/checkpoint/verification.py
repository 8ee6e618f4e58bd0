"""Whether a checkpoint's files are what its manifest says."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actckpt.checkpoint.documents import parsed
from actckpt.checkpoint.dtypes import BY_NAME, stored_as
from actckpt.checkpoint.files import Files, Source
from actckpt.checkpoint.manifest import MAX_BYTES, FileEntry, Manifest
from actckpt.checkpoint.names import MANIFEST, STATE
from actckpt.checkpoint.tensor_file import Slot, read_slots
from actckpt.errors import CheckpointError, CheckpointFormatError

LEVELS = ("full", "manifest")
STATE_VERSION = 1
# ELOOP: a symbolic link
_THE_FILES_FAULT = (
    errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EACCES, errno.EPERM,
    None,
)  # fmt: skip


def read_manifest(files: Files, directory: str) -> Manifest:
    """The manifest of the checkpoint in ``directory``, checked against its own checksum.

    Raises:
        CheckpointFormatError: there is none, or it is damaged or of another version.
    """
    where = f"{directory}/{MANIFEST}"
    with _opened(files, where) as source:
        if source.size_bytes > MAX_BYTES:
            raise CheckpointFormatError(
                f"{where} has {source.size_bytes} bytes; no manifest is above {MAX_BYTES}. "
                "Use another checkpoint"
            )
        return Manifest.from_bytes(source.read(source.size_bytes), where)


def verify_files(files: Files, directory: str, level: str = "full") -> Manifest:
    """The manifest of a checkpoint whose files are all there and sound.

    Args:
        level: "full" reads every byte; "manifest" only the manifest, and the files' sizes.

    Raises:
        CheckpointFormatError: a file is missing, damaged, or no regular file; it is named.
    """
    manifest = read_manifest(files, directory)
    for name, entry in manifest.files.items():
        where = f"{directory}/{name}"
        if level == "full":
            with checked(files, where, entry) as source:
                if name == STATE:
                    state_trees(source, where)
                else:
                    checked_slots(source, name, manifest, where)
        else:
            _check_size(where, _regular_size(files, where), entry.size_bytes)
    return manifest


def checked_slots(source: Source, file: str, manifest: Manifest, where: str) -> list[Slot]:
    """The header of a file, which must describe the tensors that the manifest has there."""
    with as_written():
        slots = read_slots(source, where)
    expected = {}
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            if chunk.file == file:
                expected[chunk.name] = stored_as(BY_NAME[tensor.dtype], chunk.shape)
    found = {slot.name: (slot.code, slot.shape) for slot in slots}
    if found != expected:
        name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise CheckpointFormatError(
            f"{where} holds {name} as {found.get(name)}; the manifest has {expected.get(name)}. "
            "Files of different checkpoints may have been mixed; use another checkpoint"
        )
    return slots


def state_trees(source: Source, where: str) -> dict[str, Any]:
    """What the items of a checkpoint are but for their tensors, by name, from its state file."""
    with as_written():
        data = parsed(source.read(source.size_bytes), where)
        if not isinstance(data, dict) or data.get("format") != "actckpt.state":
            raise CheckpointFormatError(f"{where} is no actckpt.state document")
    if data.get("format_version") != STATE_VERSION:
        raise CheckpointFormatError(
            f"{where} has format version {data.get('format_version')}; this actckpt reads version "
            f"{STATE_VERSION}: use the actckpt that wrote it"
        )
    with as_written():
        items = data.get("items")
        if not isinstance(items, dict):
            raise CheckpointFormatError(f"{where} has no items")
    return items


@contextmanager
def as_written() -> Iterator[None]:
    """Says what to do about nonsense, which no damage has made where the checksums are right."""
    try:
        yield
    except CheckpointFormatError as error:
        raise CheckpointFormatError(
            f"{error}. It was written like this: use another checkpoint"
        ) from error


@contextmanager
def checked(files: Files, where: str, entry: FileEntry) -> Iterator[Source]:
    """A file of a checkpoint; once the block has read what it wants, the whole file is checked.

    Raises:
        CheckpointFormatError: it is missing, no regular file, or not what the entry says.
        CheckpointError: it cannot be read for a reason that is not its own.
    """
    with _opened(files, where) as source:
        # before anything is allocated for it
        _check_size(where, source.size_bytes, entry.size_bytes)
        error: CheckpointFormatError | None = None
        try:
            yield source
        except CheckpointFormatError as found:
            error = found
        source.drain()
        # what is damaged reads as nonsense: say the former
        if source.checksum != entry.checksum:
            raise CheckpointFormatError(
                f"{where} is damaged: its content has not the checksum it was written with; "
                "use another checkpoint, or restore this file from a copy"
            ) from error
        if error is not None:
            raise error


def _regular_size(files: Files, where: str) -> int:
    try:
        status = files.status(where)
    except OSError as error:
        raise _unreadable(where, error) from error
    if status is None or not stat.S_ISREG(status.st_mode):
        raise missing(where, None)
    return status.st_size


@contextmanager
def _opened(files: Files, where: str) -> Iterator[Source]:
    try:
        with files.reading(where) as source:
            yield source
    except EOFError as error:
        raise CheckpointFormatError(f"{where} is truncated: it {error}") from error
    except OSError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: OSError) -> CheckpointError:
    if error.errno in _THE_FILES_FAULT:
        return missing(where, error)
    # says nothing about the file, so nobody may pass over the checkpoint for it
    return CheckpointError(f"{where} cannot be read now: {error}. Try again")


def missing(where: str, error: OSError | None) -> CheckpointFormatError:
    """That a file which must be there is not, or is no regular file."""
    reason = "there is no such regular file" if error is None else str(error)
    return CheckpointFormatError(
        f"{where} cannot be read: {reason}. Use another checkpoint, or restore this file from a "
        "copy"
    )


def _check_size(where: str, found: int, expected: int) -> None:
    if found != expected:
        verb = "truncated" if found < expected else "longer than it was written"
        raise CheckpointFormatError(
            f"{where} is {verb}: {found} bytes, {expected} in the manifest; "
            "use another checkpoint, or restore this file from a copy"
        )
