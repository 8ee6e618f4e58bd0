"""The files of frozen tensors that lie beside checkpoints: read, copied, deleted."""

from __future__ import annotations

from collections.abc import Iterable

from actckpt.checkpoint.digest import FILE_CHECKSUM
from actckpt.checkpoint.dtypes import BY_NAME, stored_as
from actckpt.checkpoint.files import PIECE_BYTES, Files
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import FROZEN, SAVING, is_base_file
from actckpt.checkpoint.tensor_file import read_slots
from actckpt.checkpoint.verification import as_written, checked


def held_in(files: Files, where: str, file: str, size_bytes: int) -> tuple[FileEntry, list[str]]:
    """A file of frozen tensors, every byte of which is as its name says, and the keys in it.

    Raises:
        CheckpointFormatError: it is damaged.
    """
    digits = file.rpartition("/")[2].partition(".")[0]
    entry = FileEntry(size_bytes, f"{FILE_CHECKSUM}:{digits}")
    with checked(files, where, entry) as source, as_written():
        slots = read_slots(source, where)
    return entry, [slot.name for slot in slots if _is_key_of(slot.name, slot.code, slot.shape)]


def _is_key_of(key: str, code: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor that is stored so may have this key."""
    dtype, _, rest = key.partition("-")
    text = rest.rpartition("-")[0]
    try:
        sizes = () if text == "scalar" else tuple(map(int, text.split("x")))
    except ValueError:
        return False
    return dtype in BY_NAME and stored_as(BY_NAME[dtype], sizes) == (code, shape)


def sweep(files: Files, directory: str, left: Iterable[Manifest]) -> None:
    """Deletes files of frozen tensors that none of the checkpoints left in a directory names.

    The caller holds the lock, and knows that those which went are gone for good.

    Raises:
        OSError: one could not be deleted.
    """
    folder = f"{directory}/{FROZEN}"
    if not files.is_directory(folder):
        return
    named = {file for manifest in left for file in manifest.base}
    names = files.names(folder)
    ours = [n for n in names if n.startswith(SAVING) or is_base_file(f"{FROZEN}/{n}")]
    doomed = [name for name in ours if f"{FROZEN}/{name}" not in named]
    for name in doomed:
        files.remove_tree(f"{folder}/{name}")
    if doomed == names:
        files.remove_tree(folder)


def copy_base(files: Files, source: str, target: str) -> None:
    """The files of frozen tensors of one directory in another, durable.

    Raises:
        OSError: not all are.
    """
    folder = f"{source}/{FROZEN}"
    if not files.is_directory(folder):
        return
    names = [n for n in files.names(folder) if is_base_file(f"{FROZEN}/{n}")]
    files.make_directories(f"{target}/{FROZEN}")
    for name in names:
        copied = f"{target}/{FROZEN}/{name}"
        with files.reading(f"{folder}/{name}") as whole, files.writing(copied) as sink:
            while count := min(PIECE_BYTES, whole.size_bytes - whole.read_bytes):
                sink.write(memoryview(whole.read(count)))
    files.sync_directory(f"{target}/{FROZEN}")
