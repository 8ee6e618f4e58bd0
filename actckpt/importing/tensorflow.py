"""Checkpoints of TensorFlow, read without it: a sorted table of entries, and files of plain values.

References:
    TensorFlow, tensor_bundle.proto and tensor_bundle.h; LevelDB, doc/table_format.md.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from actckpt.checkpoint.tensor_file import MAX_DIMENSIONS, MAX_SIZE, bytes_of
from actckpt.errors import CheckpointFormatError
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.crc32c import crc32c, masked

SUFFIX = ".index"
_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
# of the object-based checkpoints
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# types.proto; a string is no tensor here
_DTYPES = {
    1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16,
    6: torch.int8, 8: torch.complex64, 9: torch.int64, 10: torch.bool, 14: torch.bfloat16,
    17: torch.uint16, 18: torch.complex128, 19: torch.float16, 22: torch.uint32, 23: torch.uint64,
}  # fmt: skip
_STRING = 7


def index_of(path: Path) -> Path | None:
    """The index of a checkpoint that is given by what its files' names begin with."""
    index = path.with_name(path.name + SUFFIX)
    return index if index.is_file() else None


def index_in(folder: Path) -> Path | None:
    """The index in a folder: the only one, or that of the newest; None where nothing says which."""
    found = sorted(folder.glob(f"*{SUFFIX}")) or sorted(folder.glob(f"variables/*{SUFFIX}"))
    newest = folder / "checkpoint"
    if len(found) > 1 and newest.is_file():
        text = newest.read_text("utf-8", errors="replace")
        named = re.search(r'^model_checkpoint_path: "(.+)"$', text, re.MULTILINE)
        found = [index for index in found if named and index.name == Path(named[1]).name + SUFFIX]
    return found[0] if len(found) == 1 else None


def read_tensorflow(index: Path) -> dict[str, StoredTensor]:
    """The variables, by names such as ``bert/embeddings/word_embeddings``.

    Raises:
        CheckpointFormatError: damaged, incomplete, or with variables in partitions.
        OSError: it cannot be read.
    """
    where = str(index)
    prefix = index.name.removesuffix(SUFFIX)
    try:
        entries = dict(_entries(index.read_bytes(), where))
        header = _fields(entries.pop(b""))
        shards = _number(header, 1)
        if _number(header, 2):
            raise CheckpointFormatError(f"{where} is of a machine of the other order of bytes")
        found = {}
        for key, value in entries.items():
            if key.startswith(b"\0"):
                continue  # a partition, which its variable's own entry names
            name = key.decode("utf-8").removesuffix(_VALUE)
            stored = _variable(name, value, shards, index.with_name(prefix), where)
            if stored is not None:
                found[name] = stored
    except (IndexError, KeyError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointFormatError):
            raise
        raise CheckpointFormatError(
            f"{where} is damaged, or no index of TensorFlow: {error!r:.120}"
        ) from error
    return found


def _variable(
    name: str, value: bytes, shards: int, prefix: Path, where: str
) -> StoredTensor | None:
    fields = _fields(value)
    code = _number(fields, 1)
    if code == _STRING:
        return None
    if code not in _DTYPES:
        raise CheckpointFormatError(f"{where} has {name} of a dtype that is not known: {code}")
    if 7 in fields:
        raise CheckpointFormatError(
            f"{where} has {name} in partitions, which are not put together here: save the model "
            "without a partitioner"
        )
    dims = _fields(fields[2][0] if 2 in fields else b"").get(2, [])
    shape = tuple(_number(_fields(dim), 1) for dim in dims)
    shard, begin, size = (_number(fields, n) for n in (3, 4, 5))
    dtype = _DTYPES[code]
    fits = len(shape) <= MAX_DIMENSIONS and all(0 <= n <= MAX_SIZE for n in (*shape, begin, size))
    if not fits or math.prod(shape) * dtype.itemsize != size or not 0 <= shard < shards:
        raise CheckpointFormatError(f"{where} does not describe {name}")
    path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
    checksum = struct.unpack("<I", fields[6][0])[0] if 6 in fields else None
    return StoredTensor(shape, dtype, _reader(name, shape, dtype, path, begin, checksum))


def _reader(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    path: Path,
    begin: int,
    checksum: int | None,
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        size_bytes = math.prod(shape) * dtype.itemsize
        if not path.is_file() or path.stat().st_size < begin + size_bytes:
            raise CheckpointFormatError(f"{path}, which holds {name}, is missing or too short")
        tensor = torch.empty(shape, dtype=dtype)
        if not tensor.numel():
            return tensor
        data = bytes_of(tensor)
        with open(path, "rb") as file:
            file.seek(begin)
            file.readinto(data)
        if checksum is not None and masked(crc32c(data)) != checksum:
            raise CheckpointFormatError(
                f"{path} is damaged: {name} in it is not what was written (its checksum differs); "
                "use another copy"
            )
        return tensor

    return read


# ---- the table


def _entries(data: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise CheckpointFormatError(f"{where} is no index of TensorFlow, or was cut short")
    footer = data[-_FOOTER_BYTES:]
    # the first two numbers say where a block about the table is, which is not needed
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    begin, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    for _, handle in _block(data, begin, size, where):
        begin, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        yield from _block(data, begin, size, where)


def _block(data: bytes, begin: int, size: int, where: str) -> Iterator[tuple[bytes, bytes]]:
    whole = data[begin : begin + size + 5]
    if len(whole) != size + 5 or struct.unpack("<I", whole[-4:])[0] != masked(crc32c(whole[:-4])):
        raise CheckpointFormatError(f"{where} is damaged: a checksum in it differs")
    if whole[size]:
        raise CheckpointFormatError(f"{where} is compressed, which no checkpoint is")
    end = size - 4 - 4 * struct.unpack("<I", whole[size - 4 : size])[0]
    at, key = 0, b""
    while at < end:
        shared, at = _varint(whole, at)
        added, at = _varint(whole, at)
        length, at = _varint(whole, at)
        key = key[:shared] + whole[at : at + added]
        at += added
        yield key, whole[at : at + length]
        at += length


# ---- protocol buffers


def _fields(data: bytes) -> dict[int, list[bytes]]:
    """The fields of a message; numbers as eight bytes."""
    found: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(data, at)
            value = number.to_bytes(8, "little")
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = data[at : at + size], at + size
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"no field of kind {kind}")
        if at > len(data):
            raise ValueError("a field ends behind its message")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _number(fields: dict[int, list[bytes]], number: int) -> int:
    return int.from_bytes(fields[number][-1], "little", signed=True) if number in fields else 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
