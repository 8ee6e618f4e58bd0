"""A snapshot becomes a checkpoint: all of it, verified, under its name, or nothing."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.files import Files, Sink
from actckpt.checkpoint.frozen_base import FrozenBase, Placed
from actckpt.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry
from actckpt.checkpoint.names import MANIFEST, SAVING, step_name, unique
from actckpt.checkpoint.snapshot import Snapshot, contents, size_bytes, tensor_file, without
from actckpt.checkpoint.verification import checked, verify_files
from actckpt.errors import CheckpointError, CheckpointFormatError, CheckpointSaveError
from actckpt.units import GIGABYTES

logger = logging.getLogger("actckpt")


def commit(
    files: Files,
    directory: str,
    snapshot: Snapshot,
    *,
    serial: int,
    verify: str = "full",
    base: FrozenBase | None = None,
) -> Checkpoint:
    """The checkpoint, durable and verified. The caller holds the lock of ``directory``.

    Everything is written and read back in a directory that nobody looks into, which then gets its
    name in one step. No existing checkpoint is touched. Frozen tensors lie beside it before.

    What is read back comes from the page cache, as a rule: it shows that every byte was handed
    over right, not that the medium has kept it. Resuming shows that, and `verify` once more.

    Args:
        serial: larger than that of every checkpoint in the directory.
        verify: what is read back, as for `verify_files`.
        base: of this directory, as it is known from earlier saves.

    Raises:
        CheckpointSaveError: nothing was saved.
    """
    base = FrozenBase(files, directory) if base is None else base
    try:
        name = free_name(files, directory, snapshot.step)
        temporary = f"{directory}/{unique(SAVING, name)}"
        final = f"{directory}/{name}"
        frozen = base.frozen(snapshot)
        check_space(files, directory, snapshot, base.stored_bytes(snapshot, frozen))
        placed = base.hold(snapshot, frozen, verify)
        files.make_directory(temporary)
        try:
            manifest, entry = _write(files, temporary, snapshot, serial, placed)
            files.sync_directory(temporary)
            # what is shared was read back when it was written, or found here
            verify_files(files, temporary, verify, base_level="manifest")
            files.rename(temporary, final)
        except BaseException:
            abandon(files, temporary)
            raise
        files.sync_directory(directory)
        with checked(files, f"{final}/{MANIFEST}", entry):
            pass  # under its name, what it says
    except CheckpointSaveError:
        raise
    except CheckpointFormatError as error:
        raise CheckpointSaveError(
            f"step {snapshot.step} was written to {directory} and did not read back as written: "
            f"{error}. Earlier checkpoints are as before; do not trust this file system"
        ) from error
    except (OSError, CheckpointError) as error:
        raise CheckpointSaveError(
            f"step {snapshot.step} could not be saved to {directory}: {error}. Earlier checkpoints "
            "are as before; remove the cause and save again"
        ) from error
    return Checkpoint(Path(final), manifest)


def _write(
    files: Files, directory: str, snapshot: Snapshot, serial: int, placed: Placed
) -> tuple[Manifest, FileEntry]:
    """What was written, and what the manifest's own file is."""
    entries: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    # all are made durable once the last is written: meanwhile the device works on the first
    with ExitStack() as writing:
        for file, write in contents(without(snapshot, placed.at)):
            sink = writing.enter_context(files.writing(f"{directory}/{file}"))
            write(sink)
            entries[file] = _entry(sink)
    for item, encoded in snapshot.items.items():
        for key, tensor in encoded.tensors.items():
            at = placed.at.get((item, key), (tensor_file(item), key))
            tensors[f"{item}/{key}"] = _tensor_entry(tensor, *at)
    manifest = Manifest(
        step=snapshot.step,
        serial=serial,
        saved_at_s=time.time(),
        tag=snapshot.tag,
        metrics=snapshot.metrics,
        fingerprint=snapshot.fingerprint,
        versions=snapshot.versions,
        files=entries,
        tensors=tensors,
        base=placed.files,
    )
    with files.writing(f"{directory}/{MANIFEST}") as sink:
        sink.write(manifest.to_bytes())
    return manifest, _entry(sink)


def _entry(sink: Sink) -> FileEntry:
    return FileEntry(sink.written_bytes, sink.checksum)


def _tensor_entry(tensor: torch.Tensor, file: str, key: str) -> TensorEntry:
    shape = tuple(tensor.shape)
    chunk = Chunk(file, key, (0,) * len(shape), shape)
    return TensorEntry(name_of(tensor.dtype), shape, (chunk,))


def check_space(files: Files, directory: str, snapshot: Snapshot, stored_bytes: int = 0) -> None:
    """Raises where a snapshot is larger than what is free.

    Args:
        stored_bytes: of it, what is there already.

    Raises:
        CheckpointSaveError: it is.
    """
    needed = size_bytes(snapshot) - stored_bytes
    free = files.free_bytes(directory)
    if free < needed:
        raise CheckpointSaveError(
            f"step {snapshot.step} needs {GIGABYTES.text(needed)} in {directory}; "
            f"{GIGABYTES.text(free)} are free. Free some, or keep fewer checkpoints "
            "(keep_last): an old one goes only once a new one is there",
            needed_bytes=needed,
            free_bytes=free,
        )


def free_name(files: Files, directory: str, step: int) -> str:
    """The step's name, or a further one where a checkpoint of that step, sound or not, exists."""
    attempt = 0
    while files.status(f"{directory}/{step_name(step, attempt)}") is not None:
        attempt += 1
    return step_name(step, attempt)


def abandon(files: Files, temporary: str) -> None:
    """Deletes what was written of a save that failed; says so where it cannot."""
    try:
        files.remove_tree(temporary)
    except OSError as error:
        logger.warning("actckpt: %s could not be removed, the next save will: %s", temporary, error)
