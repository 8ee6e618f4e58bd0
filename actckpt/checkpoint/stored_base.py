"""Frozen tensors of checkpoints in an object store: before those that name them, and once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from actckpt.checkpoint.digest import Digest
from actckpt.checkpoint.files import PIECE_BYTES, Files
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import FROZEN, SAVING, is_base_file, unique
from actckpt.checkpoint.verification import checked
from actckpt.errors import CheckpointFormatError

logger = logging.getLogger("actckpt")


def fetch_base(files: Files, directory: str, manifest: Manifest, fs: Any, root: str) -> None:
    """What a manifest names, durable in a run's directory; what is there and sound stays.

    Raises:
        CheckpointFormatError: it is damaged in the store.
        OSError: it cannot be written.
    """
    folder = f"{directory}/{FROZEN}"
    for file, entry in manifest.base.items():
        try:
            with checked(files, f"{directory}/{file}", entry):
                continue
        except CheckpointFormatError:
            pass
        files.make_directories(folder)
        temporary = f"{folder}/{unique(SAVING, 'base')}"
        try:
            with files.writing(temporary) as sink:
                found = passed(fs, f"{root}/{file}", sink.write)
            compare(f"{root}/{file}", found, entry)
            files.rename(temporary, f"{directory}/{file}")
        finally:
            files.remove_tree(temporary)
    if manifest.base:
        files.sync_directory(folder)


def needed_bytes(files: Files, directory: str, manifest: Manifest) -> int:
    """What a checkpoint that is brought into a directory takes there."""
    absent = [e for f, e in manifest.base.items() if files.status(f"{directory}/{f}") is None]
    return manifest.size_bytes + sum(entry.size_bytes for entry in absent)


def put_base(
    directory: str, manifest: Manifest, fs: Any, root: str, *, known: set[str], buckets: bool,
    check: Callable[[Any, str, FileEntry], None],
) -> None:  # fmt: skip
    """What a manifest names, in the store; what is there and sound is not written anew.

    Args:
        known: files that were seen to be sound there; grows.
        buckets: whether the store has no folders.
        check: raises unless an object is what its entry says.

    Raises:
        CheckpointFormatError: it did not read back as written.
    """
    for file, entry in manifest.base.items():
        path = f"{root}/{file}"
        with suppress(CheckpointFormatError, FileNotFoundError):
            if file in known:
                if fs.info(path)["size"] == entry.size_bytes:
                    continue
            else:
                check(fs, path, entry)
                known.add(file)
                continue
        if not buckets:
            fs.makedirs(f"{root}/{FROZEN}", exist_ok=True)
        fs.put_file(f"{directory}/{file}", path)
        check(fs, path, entry)
        known.add(file)


def base_in(fs: Any, root: str) -> list[str]:
    """The files of frozen tensors that a store lists."""
    fs.invalidate_cache()
    try:
        paths = fs.ls(f"{root}/{FROZEN}", detail=False)
    except FileNotFoundError:
        return []
    files = [f"{FROZEN}/{path.rstrip('/').rsplit('/', 1)[-1]}" for path in paths]
    return [file for file in files if is_base_file(file)]


def sweep_base(fs: Any, root: str, held: Iterable[str], left: Iterable[Manifest]) -> None:
    """Deletes those that none of the checkpoints which are left in a store names."""
    named = {file for manifest in left for file in manifest.base}
    for file in held:
        if file not in named:
            logger.info("actckpt: removing %s/%s, which no checkpoint names", root, file)
            with suppress(FileNotFoundError):
                fs.rm(f"{root}/{file}")


def passed(fs: Any, path: str, write: Callable[[bytes], object] | None = None) -> tuple[int, str]:
    """The size and the checksum of an object, which goes by piece by piece."""
    digest, size = Digest(), 0
    try:
        with fs.open(path, "rb", cache_type="readahead") as source:
            while piece := source.read(PIECE_BYTES):
                if write is not None:
                    write(piece)
                digest.update(piece)
                size += len(piece)
    except FileNotFoundError:
        raise CheckpointFormatError(f"{path} is missing in the store") from None
    return size, digest.checksum


def compare(where: str, found: tuple[int, str], entry: FileEntry) -> None:
    """Raises unless what went by has the size and the checksum of an entry.

    Raises:
        CheckpointFormatError: it has not.
    """
    if found != (entry.size_bytes, entry.checksum):
        raise CheckpointFormatError(
            f"{where} is damaged: {found[0]} bytes of {entry.size_bytes}, or other ones than were "
            "written"
        )
