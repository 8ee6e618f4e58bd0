"""Folders of torch.distributed.checkpoint, read without torch's reader, which loads a pickle.

Where its parts lie is in ``.metadata``; a part is a slice of a ``.distcp`` file, and that slice is
a file of ``torch.save``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.tensor_file import MAX_DIMENSIONS, MAX_SIZE
from actckpt.errors import CheckpointFormatError
from actckpt.foreign.chunks import Chunk, assembled
from actckpt.foreign.restricted_pickle import Record, kind_of, restricted_load
from actckpt.foreign.stored import StoredTensor
from actckpt.foreign.torch_file import load_torch_bytes

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Part:
    """Where a chunk of a tensor, or another value, lies."""

    path: Path
    offset: int
    length: int

    def load(self, where: str) -> Any:
        """What is there."""
        self.check(where)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return load_torch_bytes(file.read(self.length), f"{self.path}: {where}")

    def check(self, where: str) -> None:
        """Raises CheckpointFormatError where the file has no such bytes."""
        try:
            size_bytes = self.path.stat().st_size
        except OSError as error:
            raise CheckpointFormatError(f"{where} cannot be read: {error}") from error
        if self.offset + self.length > size_bytes:
            raise CheckpointFormatError(
                f"{where} is in bytes {self.offset} to {self.offset + self.length} of {self.path}, "
                f"which has {size_bytes}"
            )


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A value of a folder that is no tensor."""

    read: Callable[[], Any]


def read_dcp(folder: Path) -> dict[str, Any]:
    """What was saved, nested as it was, with a `StoredTensor` or `StoredValue` at each leaf.

    Raises:
        CheckpointFormatError: damaged, incomplete, or hostile.
        OSError: it cannot be read.
    """
    path = folder / METADATA
    where = str(path)
    try:
        metadata = restricted_load(path.read_bytes(), where)
    except FileNotFoundError as error:
        raise CheckpointFormatError(
            f"{folder} has no {METADATA}: no checkpoint of torch.distributed.checkpoint, or one "
            "whose save did not end"
        ) from error
    if kind_of(metadata) != "Metadata":
        raise CheckpointFormatError(f"{where} holds no metadata: it is a {type(metadata).__name__}")
    entries = _dict(metadata.field("state_dict_metadata"), where)
    parts = _parts(folder, metadata, where)
    paths = metadata.field("planner_data")
    tree: dict[str, Any] = {}
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise CheckpointFormatError(f"{where} has an entry without a name")
        leaf = _leaf(name, entry, parts.get(name, {}), where)
        _put(tree, _path(name, paths), leaf, where)
    return tree


def _parts(folder: Path, metadata: Record, where: str) -> dict[str, dict[Any, Part]]:
    """By name, then by offset; None for what is no tensor."""
    found: dict[str, dict[Any, Part]] = {}
    for index, info in _dict(metadata.field("storage_data"), where).items():
        if kind_of(index) != "MetadataIndex" or kind_of(info) != "_StorageInfo":
            raise CheckpointFormatError(f"{where} does not say where its parts lie")
        file, offset, length = (info.field(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str):
            raise CheckpointFormatError(f"{where} does not say in which file a part lies")
        if file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointFormatError(
                f"{where} names a file outside of its folder: {file!r:.120}; nothing of it was read"
            )
        if not _is_shape((offset, length)):
            raise CheckpointFormatError(f"{where} does not say where in {file} a part lies")
        if info.field("transform_descriptors"):
            raise CheckpointFormatError(
                f"{where}: {file} was written through an extension (compressed, say), which is not "
                "read here: save it again without one"
            )
        key = index.field("offset")
        if key is not None and not _is_shape(key):
            raise CheckpointFormatError(f"{where} does not say where in a tensor a part lies")
        found.setdefault(str(index.field("fqn")), {})[key] = Part(folder / file, offset, length)
    return found


def _leaf(name: str, entry: Any, parts: Mapping[Any, Part], where: str) -> Any:
    if kind_of(entry) == "BytesStorageMetadata":
        part = _part(parts, None, name, where)
        return StoredValue(lambda: part.load(name))
    if kind_of(entry) != "TensorStorageMetadata":
        raise CheckpointFormatError(f"{where} has {name} as a {type(entry).__name__}")
    shape, properties, chunks = (entry.field(key) for key in ("size", "properties", "chunks"))
    state = getattr(properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not _is_shape(shape) or not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise CheckpointFormatError(f"{where} does not describe {name}")
    found = [_chunk(name, chunk, shape, dtype, parts, where) for chunk in chunks]
    return assembled(name, shape, dtype, found)


def _chunk(
    name: str,
    chunk: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: Mapping[Any, Part],
    where: str,
) -> Chunk:
    known = kind_of(chunk) == "ChunkStorageMetadata"
    offset: Any = chunk.field("offsets") if known else None
    size: Any = chunk.field("sizes") if known else None
    if not _fits(offset, size, shape):
        raise CheckpointFormatError(f"{where} has a chunk of {name} that lies outside of it")
    if not math.prod(size):
        # of a rank that had no share
        return Chunk(offset, StoredTensor(size, dtype, lambda: torch.empty(size, dtype=dtype)))
    part = _part(parts, offset, name, where)
    if part.length < math.prod(size) * dtype.itemsize:
        raise CheckpointFormatError(f"{where} has too few bytes for {name} at {list(offset)}")

    def read() -> torch.Tensor:
        value = part.load(name)
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not plain or value.dtype != dtype or tuple(value.shape) != size:
            raise CheckpointFormatError(f"{part.path}: {name} at {list(offset)} is something else")
        return torch.empty(size, dtype=dtype).copy_(value.detach())

    return Chunk(offset, StoredTensor(size, dtype, read))


def _part(parts: Mapping[Any, Part], at: Any, name: str, where: str) -> Part:
    if at not in parts:
        raise CheckpointFormatError(f"{where} does not say where {name} lies")
    return parts[at]


def _path(name: str, paths: Any) -> tuple[str, ...]:
    """Where a name lay in what was saved, as torch's planner has noted."""
    found = paths.get(name) if isinstance(paths, dict) else None
    known = isinstance(found, tuple) and all(isinstance(key, str | int) for key in found)
    return tuple(str(key) for key in found) if known and found else (name,)


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any, where: str) -> None:
    *outer, last = path
    for key in outer:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise CheckpointFormatError(f"{where} has {key} as a value and as a folder of values")
    if last in tree:
        raise CheckpointFormatError(f"{where} has {'.'.join(path)} twice")
    tree[last] = leaf


def _dict(x: Any, where: str) -> dict[Any, Any]:
    if not isinstance(x, dict):
        raise CheckpointFormatError(f"{where} holds no metadata of torch.distributed.checkpoint")
    return x


def _is_shape(x: Any) -> bool:
    return (
        isinstance(x, tuple)
        and len(x) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n <= MAX_SIZE for n in x)
        and math.prod(x) <= MAX_SIZE
    )


def _fits(offset: Any, size: Any, shape: tuple[int, ...]) -> bool:
    return (
        _is_shape(offset)
        and _is_shape(size)
        and len(offset) == len(size) == len(shape)
        and all(o + n <= of for o, n, of in zip(offset, size, shape, strict=True))
    )
