"""Shards of tensors that torch.distributed.checkpoint has left in safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actckpt.checkpoint.documents import parsed
from actckpt.checkpoint.tensor_file import MAX_SIZE
from actckpt.errors import CheckpointFormatError
from actckpt.foreign.chunks import Chunk, assembled
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.safetensors_file import read_with_metadata

# the header says under it where in the whole each tensor of the file begins
_KEY = "DCP_SHARDING_INFO"
# by process, from 1, and by what each process has several of
_NAME = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")


def read_shards(paths: list[Path]) -> dict[str, StoredTensor] | None:
    """The whole tensors; None where the files are not of that kind.

    Raises:
        CheckpointFormatError: a file is damaged, or the shards are not all of their tensors. That
            those of the last processes are missing, of more than two, no file says.
        OSError: a file cannot be read.
    """
    found: dict[str, list[Chunk]] = {}
    for path in paths:
        tensors, metadata = read_with_metadata(path)
        if _KEY not in metadata:
            return None
        table = parsed(str(metadata[_KEY]).encode(), f"{path}: {_KEY}")
        for name, stored in tensors.items():
            offset = _offset(table, name, stored, str(path))
            found.setdefault(name, []).append(Chunk(offset, stored))
    _check_numbers(paths)
    return {name: _whole(name, chunks) for name, chunks in found.items()}


def kind_of(paths: list[Path]) -> str:
    """What the files are, for messages: of how many processes, where their names say it."""
    processes = {m[1] for path in paths if (m := _NAME.fullmatch(path.name))}
    kind = "shards of torch.distributed.checkpoint"
    return f"{kind}, of {len(processes)} processes" if processes else kind


def read_alone(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that is no shard of several.

    Raises:
        CheckpointFormatError: it is, or it is damaged.
        OSError: it cannot be read.
    """
    tensors, metadata = read_with_metadata(path)
    if _KEY in metadata and _NAME.fullmatch(path.name):
        raise _one_of_several(path)
    return tensors


def _check_numbers(paths: list[Path]) -> None:
    parts = [m.groups() for path in paths if (m := _NAME.fullmatch(path.name))]
    if not parts:
        return
    processes = {int(process) for process, _, _ in parts}
    if len(processes) == 1:
        raise _one_of_several(paths[0])
    lost = sorted({*range(1, max(processes) + 1)} - processes)
    if lost:
        raise CheckpointFormatError(
            f"{paths[0].parent} has shards of processes up to {max(processes)}, but not of "
            f"{', '.join(map(str, lost[:8]))}: copy all that were written"
        )
    files = {int(file) for _, file, _ in parts}
    count = max(int(of) for _, _, of in parts)
    if lost := sorted({*range(1, count + 1)} - files):
        raise CheckpointFormatError(
            f"{paths[0].parent} has shards of files 1 to {count}, but none of file {lost[0]}: copy "
            "all that were written"
        )


def _one_of_several(path: Path) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} is the shard of one process, and those of others are not there: give the folder "
        "that has all of them. If one process wrote it all, pass "
        "safetensors.torch.load_file(path)"
    )


def _offset(table: Any, name: str, stored: StoredTensor, where: str) -> tuple[int, ...]:
    entry = table.get(name) if isinstance(table, Mapping) else None
    offset: Any = entry.get("saved_offsets") if isinstance(entry, Mapping) else None
    known = isinstance(offset, list) and len(offset) == len(stored.shape)
    if not known or not all(type(n) is int and 0 <= n <= MAX_SIZE for n in offset):
        raise CheckpointFormatError(f"{where} does not say where in {name} its part begins")
    return tuple(offset)


def _whole(name: str, chunks: list[Chunk]) -> StoredTensor:
    ends = [[o + n for o, n in zip(c.offset, c.stored.shape, strict=True)] for c in chunks]
    if len({len(end) for end in ends}) > 1 or len({c.stored.dtype for c in chunks}) > 1:
        raise CheckpointFormatError(f"the shards of {name} are of different tensors")
    # nothing says what shape the whole has
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    return assembled(name, shape, chunks[0].stored.dtype, chunks)
