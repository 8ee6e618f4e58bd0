"""What a checkpoint consists of: every file with size and checksum, every tensor with its place.

A run of many ranks writes version 2, whose files are the ranks' own manifests; see
`actckpt.checkpoint.rank_manifest`. One of frozen tensors writes version 3, which names files
beside the checkpoint, too; see `actckpt.checkpoint.frozen_base`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from actckpt.checkpoint.digest import FILE_CHECKSUM
from actckpt.checkpoint.documents import sealed, unsealed
from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.checkpoint.names import base_file, is_base_file, is_file_name
from actckpt.checkpoint.tensor_file import MAX_DIMENSIONS, MAX_SIZE
from actckpt.errors import CheckpointFormatError

KIND = "manifest"
# of one process, of many ranks, and of one process with frozen tensors beside
VERSION, RANKS_VERSION, BASE_VERSION = 1, 2, 3
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
        files: by name, this manifest apart; of many ranks, the manifest of each.
        tensors: by item and name, such as ``model/h.0.weight``; of many ranks, none.
        world_size: how many ranks wrote it together; 0 is a process on its own.
        data_bytes: size of all files that the ranks' manifests name.
        save: what tells this save from every other, where there are many ranks.
        base: files of frozen tensors, as `base_file` calls them, which other checkpoints name, too.
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
    world_size: int = 0
    data_bytes: int = 0
    save: str = ""
    base: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of the files, without this manifest, and without what other checkpoints share."""
        return self.data_bytes + sum(f.size_bytes for f in self.files.values())

    @property
    def base_bytes(self) -> int:
        """Size of the files of frozen tensors."""
        return sum(f.size_bytes for f in self.base.values())

    @property
    def in_base(self) -> dict[str, Chunk]:
        """The tensors in them, by item and name, and where they lie."""
        firsts = ((name, entry.chunks[0]) for name, entry in self.tensors.items() if entry.chunks)
        return {name: chunk for name, chunk in firsts if chunk.file in self.base}

    def to_bytes(self) -> bytes:
        """The text of the file; `Manifest.from_bytes` reads it back equal."""
        data = members(self)
        data["metrics"] = {k: v if math.isfinite(v) else repr(v) for k, v in self.metrics.items()}
        data["files"] = {k: members(v) for k, v in self.files.items()}
        data["tensors"] = {k: tensor_members(v) for k, v in self.tensors.items()}
        del data["base"]
        if self.world_size:
            return sealed(KIND, RANKS_VERSION, data)
        for name in ("world_size", "data_bytes", "save"):
            del data[name]
        if self.base:
            data["base"] = {k: members(v) for k, v in self.base.items()}
            return sealed(KIND, BASE_VERSION, data)
        return sealed(KIND, VERSION, data)

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray, where: str) -> Manifest:
        """The manifest that `to_bytes` wrote.

        Args:
            where: the file, for messages.

        Raises:
            CheckpointFormatError: damaged, another version, or a file outside of the checkpoint.
        """
        data = unsealed(raw, KIND, (VERSION, RANKS_VERSION, BASE_VERSION), where)
        many = data["format_version"] == RANKS_VERSION
        beside = data["format_version"] == BASE_VERSION
        try:
            found = cls(
                step=count_of(data["step"]),
                serial=count_of(data["serial"]),
                saved_at_s=float(data["saved_at_s"]),
                tag=text_of(data["tag"]),
                metrics=table_of(data["metrics"], float),
                fingerprint=text_of(data["fingerprint"]),
                versions=table_of(data["versions"], text_of),
                files=table_of(data["files"], file_of),
                tensors=table_of(data["tensors"], tensor_of),
                world_size=count_of(data["world_size"]) if many else 0,
                data_bytes=count_of(data["data_bytes"]) if many else 0,
                save=text_of(data["save"]) if many else "",
                base=table_of(data["base"], file_of) if beside else {},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointFormatError(
                f"{where} describes no checkpoint: {error!r}. Use another checkpoint"
            ) from error
        check_files(found.files, where)
        _check_base(found.base, where)
        for name, tensor in found.tensors.items():
            check_chunks(name, tensor, {*found.files, *found.base}, where)
            check_whole(name, tensor, where)
        if many and len(found.files) != found.world_size:
            raise CheckpointFormatError(
                f"{where} names {len(found.files)} manifests of {found.world_size} ranks. "
                "Use another checkpoint"
            )
        return found


def check_files(files: Iterable[str], where: str) -> None:
    """Raises unless all are plain names, in the checkpoint's own directory.

    Raises:
        CheckpointFormatError: one is not.
    """
    for name in files:
        if not is_file_name(name):
            raise CheckpointFormatError(
                f"{where} names a file {name!r}, which is no plain name in its own directory; "
                "do not trust this checkpoint"
            )


def _check_base(base: Mapping[str, FileEntry], where: str) -> None:
    for name, entry in base.items():
        if not is_base_file(name) or name != base_file(entry.checksum):
            raise CheckpointFormatError(
                f"{where} names a file of frozen tensors {name!r}, which is not called as its "
                "checksum; do not trust this checkpoint"
            )


def check_chunks(name: str, tensor: TensorEntry, files: Container[str], where: str) -> None:
    """Raises unless every chunk lies in its tensor, and in a file that is listed.

    Raises:
        CheckpointFormatError: one does not.
    """
    for chunk in tensor.chunks:
        inside = len(chunk.offset) == len(chunk.shape) == len(tensor.shape) and all(
            o + n <= size
            for o, n, size in zip(chunk.offset, chunk.shape, tensor.shape, strict=True)
        )
        if chunk.file not in files or not inside:
            raise CheckpointFormatError(
                f"{where}: a chunk of {name} lies outside of its shape {list(tensor.shape)} or "
                f"in a file that is not listed, {chunk.file!r}. Use another checkpoint"
            )


def check_whole(name: str, tensor: TensorEntry, where: str) -> None:
    """Raises unless the chunks have as many elements as the tensor.

    Whether each is there once is checked where the tensor is put together.

    Raises:
        CheckpointFormatError: they have not.
    """
    check_volume(name, tensor, volume(tensor), len(tensor.chunks), where)


def volume(tensor: TensorEntry) -> int:
    """How many elements its chunks have."""
    return sum(math.prod(c.shape) for c in tensor.chunks)


def check_volume(name: str, tensor: TensorEntry, elements: int, chunks: int, where: str) -> None:
    """As `check_whole`, of a tensor whose chunks were counted elsewhere."""
    if tensor.dtype not in BY_NAME or math.prod(tensor.shape) != elements:
        raise CheckpointFormatError(
            f"{where}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, which its "
            f"{chunks} chunks do not make up. Use another checkpoint"
        )


def members(entry: Any) -> dict[str, Any]:
    """Fields by name; `dataclasses.asdict` would copy every list and tuple deeply."""
    return {f.name: getattr(entry, f.name) for f in fields(entry)}


def tensor_members(tensor: TensorEntry) -> dict[str, Any]:
    """As JSON; `tensor_of` is the inverse."""
    return {**members(tensor), "chunks": [members(c) for c in tensor.chunks]}


def count_of(x: Any) -> int:
    """A size, a number of things, or ValueError."""
    if type(x) is not int or not 0 <= x <= MAX_SIZE:
        raise ValueError(f"no count: {x!r:.80}")
    return x


def text_of(x: Any) -> str:
    """A text, or ValueError."""
    if type(x) is not str:
        raise ValueError(f"no text: {x!r:.80}")
    return x


def table_of(x: Any, read: Callable[[Any], V]) -> dict[str, V]:
    """An object whose values are all of one kind, or ValueError."""
    if not isinstance(x, Mapping):
        raise ValueError(f"no object: {x!r:.80}")
    return {k: read(v) for k, v in x.items()}


def _shape(x: Any) -> tuple[int, ...]:
    if len(x) > MAX_DIMENSIONS:
        raise ValueError(f"{len(x)} dimensions")
    return tuple(count_of(n) for n in x)


def file_of(x: Any) -> FileEntry:
    """An entry of ``files``, or an error."""
    checksum = text_of(x["checksum"])
    if not checksum.startswith(FILE_CHECKSUM + ":"):
        raise ValueError(f"checksum {checksum!r:.80}")
    return FileEntry(count_of(x["size_bytes"]), checksum)


def tensor_of(x: Any) -> TensorEntry:
    """An entry of ``tensors``, or an error."""
    chunks = tuple(
        Chunk(text_of(c["file"]), text_of(c["name"]), _shape(c["offset"]), _shape(c["shape"]))
        for c in x["chunks"]
    )
    return TensorEntry(text_of(x["dtype"]), _shape(x["shape"]), chunks)
