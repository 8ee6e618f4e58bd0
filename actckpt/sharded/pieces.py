"""The pieces of tensors that a rank takes from a file, in the order in which they lie there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import ReadItem

from actckpt.checkpoint.digest import BLOCK_BYTES
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Chunk
from actckpt.checkpoint.rank_manifest import Shares
from actckpt.checkpoint.tensor_file import bytes_of, read_slots
from actckpt.checkpoint.verification import as_written, check_slots
from actckpt.checkpoint.verified_file import VerifiedFile, verified_file
from actckpt.sharded.reading_once import ReadingOnce

Take = Callable[[ReadItem, torch.Tensor], None]
# of a safetensors file, the length of its header
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read of a chunk."""

    item: ReadItem
    chunk: Chunk
    dtype: torch.dtype

    @property
    def rows(self) -> tuple[int, int]:
        """The first that is read, and how many."""
        if not self.chunk.shape:
            return 0, 1
        return self.item.storage_offsets[0], self.item.lengths[0]

    @property
    def row_bytes(self) -> int:
        """Of one row of the chunk."""
        return math.prod(self.chunk.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Placed:
    """What is read, and which bytes of the file that are."""

    wanted: Wanted
    begin: int
    end: int

    @property
    def blocks(self) -> range:
        return range(self.begin // BLOCK_BYTES, -(-self.end // BLOCK_BYTES))


class PiecesOf:
    """One file.

    Attributes:
        fetched_bytes: what was read of it from storage, here.
    """

    def __init__(
        self, files: Files, directory: str, file: str, shares: Shares, wanted: Sequence[Wanted]
    ) -> None:
        self.file = file
        self.entry, self._blocks = shares.file(file)
        self.fetched_bytes = 0
        self._files, self._where = files, f"{directory}/{file}"
        owner = next(r for r in shares.ranks if file in r.files)
        self._tensors = [*owner.tensors.values(), *owner.own.values()]
        self._wanted = wanted
        self._placed: list[_Placed] | None = None
        # of those, how many are read
        self._done = 0

    def head_blocks(self, held: Mapping[int, memoryview]) -> set[int]:
        """The blocks of the file's head, of which the first is held."""
        with self._opened(held) as opened, as_written():
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        end = min(_LENGTH_BYTES + length, self.entry.size_bytes)
        return {*range(-(-end // BLOCK_BYTES))}

    def blocks(self, held: Mapping[int, memoryview]) -> set[int]:
        """The blocks of all that is wanted."""
        with self._opened(held) as opened:
            return {number for placed in self._place(opened) for number in placed.blocks}

    def read(
        self, held: dict[int, memoryview] | None, take: Take, until: int | None = None
    ) -> None:
        """Takes what is wanted.

        Args:
            held: blocks that were read elsewhere; what nobody needs any more is dropped.
            until: only what ends with this block.
        """
        if until is not None and self._placed is not None:
            left = self._placed[self._done :]
            if not left or (left[0].end - 1) // BLOCK_BYTES > until:
                return
        with self._opened(held) as opened:
            placed = self._place(opened)
            # in the order in which they lie there, so that each block is fetched once
            for next_ in placed[self._done :]:
                if until is not None and (next_.end - 1) // BLOCK_BYTES > until:
                    break
                with as_written():
                    take(next_.wanted.item, _rows(opened, next_))
                self._done += 1
        if held is not None:
            left = placed[self._done :]
            first = left[0].begin // BLOCK_BYTES if left else self.entry.size_bytes
            for number in [n for n in held if n < first]:
                del held[number]

    def _opened(self, held: Mapping[int, memoryview] | None) -> _Counted:
        return _Counted(self, held)

    def _place(self, opened: VerifiedFile) -> list[_Placed]:
        if self._placed is None:
            with as_written():
                slots = read_slots(opened, self._where)
                check_slots(slots, self.file, self._tensors, self._where)
            begins = {slot.name: opened.read_bytes + slot.begin for slot in slots}
            found = []
            for wanted in self._wanted:
                first, count = wanted.rows
                begin = begins[wanted.chunk.name] + first * wanted.row_bytes
                found.append(_Placed(wanted, begin, begin + count * wanted.row_bytes))
            self._placed = sorted(found, key=lambda p: (p.begin, p.end))
        return self._placed


class _Counted:
    """The file, open; what was fetched is added up."""

    def __init__(self, pieces: PiecesOf, held: Mapping[int, memoryview] | None) -> None:
        self._pieces = pieces
        self._opening = verified_file(
            pieces._files, pieces._where, pieces.entry, pieces._blocks, held
        )

    def __enter__(self) -> VerifiedFile:
        self._file = self._opening.__enter__()
        return self._file

    def __exit__(self, *raised: object) -> bool | None:
        self._pieces.fetched_bytes += self._file.fetched_bytes
        return self._opening.__exit__(*raised)  # type: ignore[arg-type]


def read_once(once: ReadingOnce, pieces: Sequence[PiecesOf], take: Take) -> None:
    """As `PiecesOf.read` of several files, in the order of their names, together with all ranks."""
    entries = {part.file: part.entry for part in pieces}
    once.round({part.file: {0} for part in pieces}, entries)
    heads = {part.file: part.head_blocks(once.held[part.file]) for part in pieces}
    once.round({file: heads[file] - {0} for file in heads}, entries)
    wanted = {}
    for part in pieces:
        held = once.held[part.file]
        needed = part.blocks(held)
        for number in [n for n in held if n not in needed]:
            del held[number]
        wanted[part.file] = needed - held.keys()

    def arrived(file: str, number: int) -> None:
        for part in pieces:
            if part.file <= file:
                until = number if part.file == file else None
                part.read(once.held.setdefault(part.file, {}), take, until)

    once.round(wanted, entries, arrived)
    for part in pieces:
        part.read(once.held.pop(part.file, {}), take)


def _rows(file: VerifiedFile, placed: _Placed) -> torch.Tensor:
    """The part of a chunk that is wanted: its rows are read, and cut where they are longer."""
    wanted = placed.wanted
    shape, item = wanted.chunk.shape, wanted.item
    rows = torch.empty((wanted.rows[1], *shape[1:]) if shape else (), dtype=wanted.dtype)
    if rows.numel():
        file.read_at(placed.begin, bytes_of(rows))
    for dim in range(1, len(shape)):
        rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    return rows
