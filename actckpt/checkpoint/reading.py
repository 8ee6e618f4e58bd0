"""The state of a checkpoint, or of the newest of a run, while somebody else may write there."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.decoding import decode
from actckpt.checkpoint.discovery import Checkpoint, checkpoint_at
from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from actckpt.checkpoint.names import STATE, is_base_file, path_of
from actckpt.checkpoint.tensor_file import read_tensors
from actckpt.checkpoint.united import united_items
from actckpt.checkpoint.verification import (
    as_written,
    checked,
    checked_slots,
    missing,
    read_manifest,
    read_shares,
    state_trees,
)
from actckpt.errors import CheckpointFormatError


def read_checkpoint(
    files: Files, checkpoint: Checkpoint | str | os.PathLike[str]
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its items, every byte verified. Takes no lock.

    Args:
        checkpoint: one, its directory, or that of a run, which stands for the newest.

    Raises:
        CheckpointFormatError: it is damaged.
        CheckpointError: there is none.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint, read_state(files, str(checkpoint.path))[1]
    while True:
        found = checkpoint_at(files, os.fspath(checkpoint))
        try:
            return found, read_state(files, str(found.path))[1]
        except CheckpointFormatError:
            # of a run whose newest was retired in the meantime, there is a newer one
            if found.path == Path(checkpoint) or files.status(str(found.path)) is not None:
                raise


def read_state(files: Files, directory: str) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the items of a checkpoint, every byte verified on the way.

    Tensors are on the CPU, in memory of their own.

    Raises:
        CheckpointFormatError: as `verify_files`.
    """
    manifest = read_manifest(files, directory)
    if manifest.world_size:
        return manifest, _read_together(files, directory, manifest)
    entries = [*manifest.tensors.values()]
    trees, pieces = _read_files(files, directory, {**manifest.files, **manifest.base}, entries)
    if STATE not in trees:
        raise missing(f"{directory}/{STATE}", None)
    with as_written():
        return manifest, _decoded(manifest.tensors, trees[STATE], pieces, directory)


def _read_together(files: Files, directory: str, manifest: Manifest) -> dict[str, Any]:
    """What many ranks wrote, as one state: the first one's, and what only others have."""
    shares = read_shares(files, directory, manifest)
    trees: list[dict[str, Any]] = []
    pieces: Pieces = {}
    for share in shares.ranks:
        entries = [*share.tensors.values(), *share.own.values()]
        found, parts = _read_files(files, directory, share.files, entries)
        pieces |= parts
        trees += found.values()
    with as_written():
        return _decoded(shares.tensors(None, directory), united_items(trees), pieces, directory)


# of a checkpoint, by file and name in it
Pieces = dict[tuple[str, str], torch.Tensor]


def _read_files(
    files: Files,
    directory: str,
    entries: Mapping[str, FileEntry],
    tensors: Collection[TensorEntry],
) -> tuple[dict[str, dict[str, Any]], Pieces]:
    """What is in some files: the items of each that has them, and tensors."""
    trees: dict[str, dict[str, Any]] = {}
    pieces: Pieces = {}
    for name, entry in entries.items():
        where = path_of(directory, name)
        with checked(files, where, entry) as source:
            if name.endswith(".json"):
                trees[name] = state_trees(source, where)
            else:
                slots = checked_slots(source, name, tensors, where)
                found = read_tensors(source, slots)
                pieces.update({(name, key): tensor for key, tensor in found.items()})
    return trees, pieces


def _decoded(
    tensors: Mapping[str, TensorEntry], trees: dict[str, Any], pieces: Pieces, directory: str
) -> dict[str, Any]:
    """The items of which all files are sound."""
    by_item: dict[str, dict[str, torch.Tensor]] = {item: {} for item in trees}
    taken: set[tuple[str, str]] = set()
    for name, entry in tensors.items():
        item, _, key = name.partition("/")
        if item not in by_item:
            raise CheckpointFormatError(f"{directory}/{STATE} has no item for tensor {name}")
        found = _assembled(entry, pieces, f"{directory}: {name}")
        at = [(c.file, c.name) for c in entry.chunks if is_base_file(c.file)]
        # two tensors of one content lie there once, and are two
        by_item[item][key] = found.clone() if taken.intersection(at) else found
        taken.update(at)
    where = f"{directory}/{STATE}"
    return {item: decode(tree, by_item[item], where) for item, tree in trees.items()}


def _assembled(entry: TensorEntry, pieces: Pieces, where: str) -> torch.Tensor:
    """A tensor from its chunks."""
    dtype = BY_NAME[entry.dtype]
    chunks = [(c, _as(pieces[c.file, c.name], dtype, c.shape)) for c in entry.chunks]
    if len(chunks) == 1 and chunks[0][0].shape == entry.shape:
        return chunks[0][1]
    whole = torch.empty(entry.shape, dtype=dtype)
    covered = torch.zeros(entry.shape, dtype=torch.bool)
    for chunk, piece in chunks:
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = piece
        covered[box] = True
    # as many elements as the tensor has (the manifest's own check), each once
    if not covered.all():
        raise CheckpointFormatError(f"{where} has chunks that overlap")
    return whole


def _as(stored: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return stored if stored.dtype == dtype else stored.view(dtype).reshape(shape)
