"""What the coordinator sees of what the ranks wrote: every manifest, and that every file is there.

The list of a rank's tensors is the same save after save. Its bytes are compared every time; what
they say is read where they are others than those that were read last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import xxhash

from actckpt.checkpoint.documents import without_table
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry, TensorEntry, check_volume, volume
from actckpt.checkpoint.rank_manifest import RankManifest, check_same, check_together
from actckpt.checkpoint.verification import check_present, checked

_TABLE = "tensors"


@dataclass(frozen=True, slots=True)
class _Table:
    """A rank's list of tensors, as it was read: its digest, and the files that it speaks of."""

    digest: bytes
    files: frozenset[str]


class Sight:
    """What was seen at the save before.

    Attributes:
        read: how many lists of tensors were read so far.
    """

    def __init__(self) -> None:
        self.read = 0
        self._tables: list[_Table] = []

    def look(
        self, files: Files, directory: str, entries: Mapping[str, FileEntry], save: str
    ) -> int:
        """Size of all files of all ranks, in bytes, once each was seen with its size.

        Args:
            entries: of the ranks' manifests, by name, in the order of the ranks.

        Raises:
            CheckpointFormatError: something is missing or damaged, of another save, or the
                tensors of all together are not whole.
        """
        whole = _Whole(directory)
        shares, tables, passed = [], [], []
        for rank, (name, entry) in enumerate(entries.items()):
            where = f"{directory}/{name}"
            raw = _read(files, where, entry)
            share = self._as_before(rank, raw, where)
            if share is None:
                share = self._anew(raw, where, whole)
                tables.append(_table(raw, share))
            else:
                tables.append(self._tables[rank])
                passed.append((name, entry))
            shares.append(replace(share, tensors={}))
        together = check_together(shares, save, directory)
        for share in together.ranks:
            for file, found in share.files.items():
                check_present(files, f"{directory}/{file}", found)
        if tables != self._tables:
            for name, entry in passed:
                where = f"{directory}/{name}"
                self._anew(_read(files, where, entry), where, whole)
            whole.check()
            self._tables = tables
        return sum(share.size_bytes for share in together.ranks)

    def _as_before(self, rank: int, raw: bytes, where: str) -> RankManifest | None:
        """The manifest without its tensors, if they are those that were read last."""
        if rank >= len(self._tables):
            return None
        text, lines = without_table(raw, _TABLE)
        before = self._tables[rank]
        if not lines or xxhash.xxh3_128_digest(lines) != before.digest:
            return None
        share = RankManifest.from_bytes(raw, where, text=text)
        return share if not share.tensors and before.files <= share.files.keys() else None

    def _anew(self, raw: bytes, where: str, whole: _Whole) -> RankManifest:
        share = RankManifest.from_bytes(raw, where)
        self.read += 1
        whole.add(share)
        return share


class _Whole:
    """The tensors of all ranks, counted one rank after another: all at once are too many."""

    def __init__(self, where: str) -> None:
        self._where = where
        # of each tensor what describes it, and how many elements in how many chunks were found
        self._found: dict[str, tuple[TensorEntry, int, int]] = {}

    def add(self, share: RankManifest) -> None:
        for name, entry in share.tensors.items():
            before, elements, chunks = self._found.get(name, (replace(entry, chunks=()), 0, 0))
            check_same(name, before, entry, self._where)
            self._found[name] = before, elements + volume(entry), chunks + len(entry.chunks)

    def check(self) -> None:
        for name, (entry, elements, chunks) in self._found.items():
            check_volume(name, entry, elements, chunks, self._where)


def _read(files: Files, where: str, entry: FileEntry) -> bytes:
    with checked(files, where, entry) as source:
        return bytes(source.read(source.size_bytes))


def _table(raw: bytes, share: RankManifest) -> _Table:
    _, lines = without_table(raw, _TABLE)
    # one that is not written in lines is never the one before
    digest = xxhash.xxh3_128_digest(lines if lines or not share.tensors else raw)
    files = frozenset(c.file for entry in share.tensors.values() for c in entry.chunks)
    return _Table(digest, files)
