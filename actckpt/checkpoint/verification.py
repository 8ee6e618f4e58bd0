"""Whether a checkpoint's files are what its manifest says."""

from __future__ import annotations

import errno
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from actckpt.checkpoint.documents import parsed
from actckpt.checkpoint.dtypes import BY_NAME, stored_as
from actckpt.checkpoint.files import Files, Source
from actckpt.checkpoint.manifest import MAX_BYTES, FileEntry, Manifest, TensorEntry
from actckpt.checkpoint.names import FROZEN, MANIFEST, is_base_file, path_of, rank_file
from actckpt.checkpoint.rank_manifest import RankManifest, Shares, check_together
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
    with opened(files, where) as source:
        if source.size_bytes > MAX_BYTES:
            raise CheckpointFormatError(
                f"{where} has {source.size_bytes} bytes; no manifest is above {MAX_BYTES}. "
                "Use another checkpoint"
            )
        return Manifest.from_bytes(source.read(source.size_bytes), where)


def verify_files(
    files: Files, directory: str, level: str = "full", *, base_level: str | None = None
) -> Manifest:
    """The manifest of a checkpoint whose files are all there and sound.

    Args:
        level: "full" reads every byte; "manifest" only the manifest, and the files' sizes.
        base_level: of the files that it shares with others; None is ``level``.

    Raises:
        CheckpointFormatError: a file is missing, damaged, or no regular file; it is named.
    """
    manifest = read_manifest(files, directory)
    if not manifest.world_size:
        tensors = [*manifest.tensors.values()]
        _verify(files, directory, manifest.files, tensors, level)
        _verify(files, directory, manifest.base, tensors, base_level or level)
        return manifest
    for share in read_shares(files, directory, manifest).ranks:
        verify_share(files, directory, share, level)
    return manifest


def verify_share(files: Files, directory: str, share: RankManifest, level: str = "full") -> None:
    """As `verify_files`, of what one rank of many wrote."""
    tensors = [*share.tensors.values(), *share.own.values()]
    _verify(files, directory, share.files, tensors, level)


def read_shares(files: Files, directory: str, manifest: Manifest) -> Shares:
    """The manifests of all ranks of a checkpoint, each checked.

    Raises:
        CheckpointFormatError: one is missing, damaged, or of another save.
    """
    return check_together(
        [
            read_share(files, directory, rank_file(rank), manifest.files)
            for rank in range(manifest.world_size)
        ],
        manifest.save,
        directory,
    )


def read_share(
    files: Files, directory: str, name: str, entries: Mapping[str, FileEntry]
) -> RankManifest:
    """One of them.

    Raises:
        CheckpointFormatError: it is missing or damaged.
    """
    where = f"{directory}/{name}"
    if name not in entries:
        raise missing(where, None)
    with checked(files, where, entries[name]) as source:
        return RankManifest.from_bytes(source.read(source.size_bytes), where)


def _verify(
    files: Files,
    directory: str,
    entries: Mapping[str, FileEntry],
    tensors: Collection[TensorEntry],
    level: str,
) -> None:
    for name, entry in entries.items():
        where = path_of(directory, name)
        if level == "full":
            with checked(files, where, entry) as source:
                if name.endswith(".json"):
                    state_trees(source, where)
                else:
                    checked_slots(source, name, tensors, where)
        else:
            check_present(files, where, entry)


def check_present(files: Files, where: str, entry: FileEntry) -> None:
    """Raises unless a file is there with its size; reads nothing of it.

    Raises:
        CheckpointFormatError: it is not.
    """
    _check_size(where, _regular_size(files, where), entry.size_bytes)


def checked_slots(
    source: Source, file: str, tensors: Iterable[TensorEntry], where: str
) -> list[Slot]:
    """The header of a file, which must describe the chunks that these tensors have there."""
    with as_written():
        slots = read_slots(source, where)
    check_slots(slots, file, tensors, where)
    return slots


def check_slots(
    slots: Iterable[Slot], file: str, tensors: Iterable[TensorEntry], where: str
) -> None:
    """Raises unless a file holds the chunks that these tensors have there; one that checkpoints
    share may hold more.

    Raises:
        CheckpointFormatError: it holds others.
    """
    expected = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            if chunk.file == file:
                expected[chunk.name] = stored_as(BY_NAME[tensor.dtype], chunk.shape)
    found = {slot.name: (slot.code, slot.shape) for slot in slots}
    if is_base_file(file):
        found = {name: held for name, held in found.items() if name in expected}
    if found != expected:
        name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise CheckpointFormatError(
            f"{where} holds {name} as {found.get(name)}; the manifest has {expected.get(name)}. "
            "Files of different checkpoints may have been mixed; use another checkpoint"
        )


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
    with opened(files, where) as source:
        # before anything is allocated for it
        check_source(source, where, entry)
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


def check_source(source: Source, where: str, entry: FileEntry) -> None:
    """Raises unless an open file has its size.

    Raises:
        CheckpointFormatError: it has not.
    """
    _check_size(where, source.size_bytes, entry.size_bytes)


def _regular_size(files: Files, where: str) -> int:
    try:
        status = files.status(where)
    except OSError as error:
        raise _unreadable(where, error) from error
    if status is None or not stat.S_ISREG(status.st_mode):
        raise missing(where, None)
    return status.st_size


@contextmanager
def opened(files: Files, where: str) -> Iterator[Source]:
    """A file of a checkpoint, whose errors say what to do.

    Raises:
        CheckpointFormatError: it is missing, no regular file, or shorter than what was asked for.
        CheckpointError: it cannot be read for a reason that is not its own.
    """
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
    shared = f" (a checkpoint that is copied needs its run's {FROZEN}, too)"
    return CheckpointFormatError(
        f"{where} cannot be read: {reason}. Use another checkpoint, or restore this file from a "
        f"copy{shared if is_base_file(_last_two(where)) else ''}"
    )


def _last_two(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def _check_size(where: str, found: int, expected: int) -> None:
    if found != expected:
        verb = "truncated" if found < expected else "longer than it was written"
        raise CheckpointFormatError(
            f"{where} is {verb}: {found} bytes, {expected} in the manifest; "
            "use another checkpoint, or restore this file from a copy"
        )
