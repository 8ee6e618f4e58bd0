"""What a checkpoint consists of: every file with size and checksum, every tensor with its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from actckpt.checkpoint.digest import FILE_CHECKSUM
from actckpt.checkpoint.documents import sealed, unsealed
from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.checkpoint.names import is_file_name
from actckpt.checkpoint.tensor_file import MAX_DIMENSIONS, MAX_SIZE
from actckpt.errors import CheckpointFormatError

KIND = "manifest"
VERSION = 1
# some 300 bytes a tensor
MAX_BYTES = 256_000_000

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its size, and the `Digest` of its content."""

    size_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins in it, its shape, and where its data is."""

    file: str
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: torch's name of its dtype, its global shape, and chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One checkpoint.

    Args:
        step: optimizer steps that had been made.
        serial: grows with every save into a directory; the newest checkpoint has the largest.
        saved_at_s: seconds since 1970.
        tag: the user's own word for it, "" for none.
        metrics: what was reported with the step; may hold NaN and infinities.
        fingerprint: of the model's tensors: names, dtypes, shapes.
        versions: libraries and machine.
        files: by name, this manifest apart.
        tensors: by item and name, such as ``model/h.0.weight``.
    """

    step: int
    serial: int
    saved_at_s: float
    tag: str
    metrics: dict[str, float]
    fingerprint: str
    versions: dict[str, str]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def size_bytes(self) -> int:
        """Size of the files, without this manifest."""
        return sum(f.size_bytes for f in self.files.values())

    def to_bytes(self) -> bytes:
        """The text of the file; `Manifest.from_bytes` reads it back equal."""
        data = _members(self)
        data["metrics"] = {k: v if math.isfinite(v) else repr(v) for k, v in self.metrics.items()}
        data["files"] = {k: _members(v) for k, v in self.files.items()}
        data["tensors"] = {k: _tensor_members(v) for k, v in self.tensors.items()}
        return sealed(KIND, VERSION, data)

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray, where: str) -> Manifest:
        """The manifest that `to_bytes` wrote.

        Args:
            where: the file, for messages.

        Raises:
            CheckpointFormatError: damaged, another version, or a file outside of the checkpoint.
        """
        data = unsealed(raw, KIND, VERSION, where)
        try:
            found = cls(
                step=_count(data["step"]),
                serial=_count(data["serial"]),
                saved_at_s=float(data["saved_at_s"]),
                tag=_text(data["tag"]),
                metrics=_table(data["metrics"], float),
                fingerprint=_text(data["fingerprint"]),
                versions=_table(data["versions"], _text),
                files=_table(data["files"], _file),
                tensors=_table(data["tensors"], _tensor),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointFormatError(
                f"{where} describes no checkpoint: {error!r}. Use another checkpoint"
            ) from error
        _check(found, where)
        return found


def _check(manifest: Manifest, where: str) -> None:
    for name in manifest.files:
        if not is_file_name(name):
            raise CheckpointFormatError(
                f"{where} names a file {name!r}, which is no plain name in its own directory; "
                "do not trust this checkpoint"
            )
    for name, tensor in manifest.tensors.items():
        # tiling is checked where the tensor is put together
        for chunk in tensor.chunks:
            inside = len(chunk.offset) == len(chunk.shape) == len(tensor.shape) and all(
                o + n <= size
                for o, n, size in zip(chunk.offset, chunk.shape, tensor.shape, strict=True)
            )
            if chunk.file not in manifest.files or not inside:
                raise CheckpointFormatError(
                    f"{where}: a chunk of {name} lies outside of its shape {list(tensor.shape)} or "
                    f"in a file that is not listed, {chunk.file!r}. Use another checkpoint"
                )
        if tensor.dtype not in BY_NAME or math.prod(tensor.shape) != sum(
            math.prod(c.shape) for c in tensor.chunks
        ):
            raise CheckpointFormatError(
                f"{where}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, which its "
                f"{len(tensor.chunks)} chunks do not make up. Use another checkpoint"
            )


def _members(entry: Any) -> dict[str, Any]:
    """Fields by name; `dataclasses.asdict` would copy every list and tuple deeply."""
    return {f.name: getattr(entry, f.name) for f in fields(entry)}


def _tensor_members(tensor: TensorEntry) -> dict[str, Any]:
    return {**_members(tensor), "chunks": [_members(c) for c in tensor.chunks]}


def _count(x: Any) -> int:
    if type(x) is not int or not 0 <= x <= MAX_SIZE:
        raise ValueError(f"no count: {x!r:.80}")
    return x


def _text(x: Any) -> str:
    if type(x) is not str:
        raise ValueError(f"no text: {x!r:.80}")
    return x


def _table(x: Any, read: Callable[[Any], V]) -> dict[str, V]:
    if not isinstance(x, Mapping):
        raise ValueError(f"no object: {x!r:.80}")
    return {k: read(v) for k, v in x.items()}


def _shape(x: Any) -> tuple[int, ...]:
    if len(x) > MAX_DIMENSIONS:
        raise ValueError(f"{len(x)} dimensions")
    return tuple(_count(n) for n in x)


def _file(x: Any) -> FileEntry:
    checksum = _text(x["checksum"])
    if not checksum.startswith(FILE_CHECKSUM + ":"):
        raise ValueError(f"checksum {checksum!r:.80}")
    return FileEntry(_count(x["size_bytes"]), checksum)


def _tensor(x: Any) -> TensorEntry:
    chunks = tuple(
        Chunk(_text(c["file"]), _text(c["name"]), _shape(c["offset"]), _shape(c["shape"]))
        for c in x["chunks"]
    )
    return TensorEntry(_text(x["dtype"]), _shape(x["shape"]), chunks)
