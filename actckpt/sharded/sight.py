"""What the coordinator sees of what ranks wrote: each manifest, and that each file is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from actckpt.checkpoint.documents import without_table
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry, TensorEntry, check_volume, volume
from actckpt.checkpoint.rank_manifest import RankManifest, check_same, check_together
from actckpt.checkpoint.verification import check_present, checked
from actckpt.sharded.expected import Table, digest_of


def look(
    files: Files,
    directory: str,
    entries: Mapping[str, FileEntry],
    save: str,
    expected: Sequence[Table],
) -> int:
    """Size of all files of all ranks, in bytes, once each was seen with its size.

    A list of tensors that is what the plan says is not read but compared, byte for byte: there are
    as many entries in all as ranks times tensors, and the plan is of whole ones.

    Args:
        entries: of the ranks' manifests, by name, in the order of the ranks.
        expected: by rank.

    Raises:
        CheckpointFormatError: something is missing or damaged, of another save, or the tensors of
            all together are not whole.
    """
    shares = []
    as_planned = True
    for (name, entry), table in zip(entries.items(), expected, strict=True):
        where = f"{directory}/{name}"
        raw = _read(files, where, entry)
        text, lines = without_table(raw, "tensors")
        share = RankManifest.from_bytes(raw, where, text=text)
        # written in other lines, the list is still in the text
        as_planned &= not share.tensors and table == Table(digest_of(lines), table.files)
        as_planned &= table.files <= share.files.keys()
        shares.append(replace(share, tensors={}))
    together = check_together(shares, save, directory)
    for share in together.ranks:
        for file, found in share.files.items():
            check_present(files, f"{directory}/{file}", found)
    if not as_planned:
        _check_whole(files, directory, entries)
    return sum(share.size_bytes for share in together.ranks)


def _check_whole(files: Files, directory: str, entries: Mapping[str, FileEntry]) -> None:
    """Reads every list, one rank after another: all at once are too many."""
    # of each tensor what describes it, and how many elements in how many chunks were found
    found: dict[str, tuple[TensorEntry, int, int]] = {}
    for file, manifest in entries.items():
        where = f"{directory}/{file}"
        share = RankManifest.from_bytes(_read(files, where, manifest), where)
        for name, entry in share.tensors.items():
            before, elements, chunks = found.get(name, (replace(entry, chunks=()), 0, 0))
            check_same(name, before, entry, directory)
            found[name] = before, elements + volume(entry), chunks + len(entry.chunks)
    for name, (entry, elements, chunks) in found.items():
        check_volume(name, entry, elements, chunks, directory)


def _read(files: Files, where: str, entry: FileEntry) -> bytes:
    with checked(files, where, entry) as source:
        return bytes(source.read(source.size_bytes))
