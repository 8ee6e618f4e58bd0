"""Tensors to and from a safetensors file, in one pass over its bytes.

References:
    The safetensors format: eight bytes of header length, a JSON header, the data without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from actckpt.checkpoint.documents import parsed
from actckpt.checkpoint.dtypes import BY_CODE, stored_as
from actckpt.checkpoint.files import Source
from actckpt.errors import CheckpointFormatError

# as in the reference implementation
MAX_HEADER_BYTES = 100_000_000
# beyond these torch itself fails, in ways of its own
MAX_SIZE = 2**48
MAX_DIMENSIONS = 64
_LENGTH_BYTES = 8
# the data begins where vector instructions like it
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in the data of a file."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes | memoryview) -> None: ...


def write_tensors(sink: Writable, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a whole file; elements of tensors on other devices come here one tensor at a time."""
    # wide elements first: then every one of them is aligned
    order = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        code, shape = stored_as(tensor.dtype, tuple(tensor.shape))
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    sink.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for _, tensor in order:
        if tensor.numel():
            sink.write(bytes_of(tensor))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements in C order, at least one; a window on the tensor's own memory where possible."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # a dimension of one may have any stride, and still count as contiguous
    array: Any = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    return memoryview(array)


class Readable(Protocol):
    """A file being read from its beginning, such as a `Source`."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, count: int) -> bytearray: ...


def read_slots(source: Readable, where: str) -> list[Slot]:
    """The tensors of a file; as `read_header`."""
    return read_header(source, where)[0]


def read_header(source: Readable, where: str) -> tuple[list[Slot], dict[str, Any]]:
    """The tensors of a file, and what else its header says, checked against the file's size.

    Nothing is allocated for tensors.

    Raises:
        CheckpointFormatError: the file is no safetensors file, or its header does not describe it.
    """
    try:
        length = int.from_bytes(source.read(_LENGTH_BYTES), "little")
        left = source.size_bytes - _LENGTH_BYTES
        if length > min(left, MAX_HEADER_BYTES):
            raise CheckpointFormatError(
                f"{where} is no safetensors file: it claims a header of {length} bytes; "
                f"{left} follow, and at most {MAX_HEADER_BYTES} are read"
            )
        header = parsed(source.read(length), where)
    except EOFError as error:
        raise CheckpointFormatError(f"{where} is truncated: it {error}") from error
    if not isinstance(header, dict):
        raise CheckpointFormatError(f"{where} has no safetensors header")
    slots = [_slot(k, v, where) for k, v in header.items() if k != "__metadata__"]
    slots.sort(key=lambda slot: (slot.begin, slot.end))
    at = 0
    for slot in slots:
        if slot.begin != at:
            raise CheckpointFormatError(
                f"{where} has no data for {slot.name} where it should begin: at {at}, "
                f"not {slot.begin}"
            )
        at = slot.end
    if at != left - length:
        raise CheckpointFormatError(
            f"{where} holds {left - length} bytes of data; its header describes {at}"
        )
    said = header.get("__metadata__", {})
    return slots, said if isinstance(said, dict) else {}


def read_tensors(source: Source, slots: list[Slot]) -> dict[str, torch.Tensor]:
    """The tensors behind a header, as stored, each in memory of its own.

    Raises:
        EOFError: the file has become shorter since.
    """
    found = {}
    for slot in slots:
        found[slot.name] = tensor = torch.empty(slot.shape, dtype=BY_CODE[slot.code])
        if tensor.numel():
            source.read_into(bytes_of(tensor))
    return found


def _slot(name: str, entry: Any, where: str) -> Slot:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = BY_CODE[code].itemsize
        fits = all(type(n) is int and 0 <= n <= MAX_SIZE for n in (*shape, begin, end))
        fits = fits and len(shape) <= MAX_DIMENSIONS
        fits = fits and math.prod(shape) * size == end - begin
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointFormatError(f"{where} describes no tensor as {name}: {error!r}") from error
    if not fits:
        raise CheckpointFormatError(
            f"{where} describes {name} as {code} of shape {list(shape)} in bytes {begin} to {end}"
        )
    return Slot(name, code, shape, begin, end)
