"""What one rank of many wrote into a checkpoint, and what all of them wrote together."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from actckpt.checkpoint.digest import BLOCK_BYTES, BLOCK_DIGEST_BYTES, checksum_of_blocks
from actckpt.checkpoint.documents import sealed, unsealed
from actckpt.checkpoint.manifest import (
    Chunk,
    FileEntry,
    TensorEntry,
    check_chunks,
    check_files,
    check_whole,
    count_of,
    file_of,
    members,
    table_of,
    tensor_members,
    tensor_of,
    text_of,
)
from actckpt.errors import CheckpointFormatError

KIND = "rank"
VERSION = 1


@dataclass(frozen=True, slots=True)
class RankManifest:
    """The share of one rank.

    Args:
        rank: from 0.
        save: as in `Manifest`: of which save it is.
        files: by name.
        blocks: of each file the digests of its blocks, so that a part is verified by itself.
        trees: names of the items whose tree is in this rank's state file.
        tensors: by item and name; the chunks of them that this rank wrote.
        own: likewise, of tensors that another rank had otherwise; whole.
        without: names of items that the first rank had and this one had not.
    """

    rank: int
    save: str
    files: dict[str, FileEntry]
    blocks: dict[str, bytes]
    trees: tuple[str, ...]
    tensors: dict[str, TensorEntry]
    own: dict[str, TensorEntry] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Size of the files."""
        return sum(f.size_bytes for f in self.files.values())

    def to_bytes(self) -> bytes:
        """The text of the file; `from_bytes` reads it back equal."""
        data = members(self)
        data["files"] = {k: members(v) for k, v in self.files.items()}
        data["blocks"] = {k: base64.b64encode(v).decode() for k, v in self.blocks.items()}
        data["tensors"] = {k: tensor_members(v) for k, v in self.tensors.items()}
        data["own"] = {k: tensor_members(v) for k, v in self.own.items()}
        return sealed(KIND, VERSION, data)

    @classmethod
    def from_bytes(
        cls, raw: bytes | bytearray, where: str, *, text: bytes | None = None
    ) -> RankManifest:
        """The manifest that `to_bytes` wrote.

        Args:
            where: the file, for messages.
            text: as for `unsealed`: what is left of it without its tensors.

        Raises:
            CheckpointFormatError: damaged, another version, or a file outside of the checkpoint.
        """
        data = unsealed(raw, KIND, (VERSION,), where, text)
        try:
            found = cls(
                rank=count_of(data["rank"]),
                save=text_of(data["save"]),
                files=table_of(data["files"], file_of),
                blocks=table_of(data["blocks"], lambda x: base64.b64decode(x, validate=True)),
                trees=tuple(map(text_of, data["trees"])),
                tensors=table_of(data["tensors"], tensor_of),
                own=table_of(data["own"], tensor_of),
                # shares of earlier versions do not say
                without=tuple(map(text_of, data.get("without", ()))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointFormatError(
                f"{where} describes no share of a rank: {error!r}. Use another checkpoint"
            ) from error
        check_files(found.files, where)
        for name, entry in found.files.items():
            blocks = found.blocks.get(name, b"")
            count = -(-entry.size_bytes // BLOCK_BYTES)
            if len(blocks) != count * BLOCK_DIGEST_BYTES or (
                checksum_of_blocks(blocks) != entry.checksum
            ):
                raise CheckpointFormatError(
                    f"{where}: the digests of {name} are not those of its checksum. "
                    "Use another checkpoint"
                )
        for name, tensor in [*found.tensors.items(), *found.own.items()]:
            check_chunks(name, tensor, found.files, where)
        for name, tensor in found.own.items():
            check_whole(name, tensor, where)
        return found


@dataclass(frozen=True, slots=True)
class Shares:
    """What all ranks of a checkpoint wrote, in their order."""

    ranks: tuple[RankManifest, ...]

    def file(self, name: str) -> tuple[FileEntry, bytes]:
        """Entry and digests of the blocks of one file."""
        rank = next(r for r in self.ranks if name in r.files)
        return rank.files[name], rank.blocks[name]

    def tensors(self, rank: int | None, where: str) -> dict[str, TensorEntry]:
        """Every tensor with all of its chunks, as a rank had them.

        Args:
            rank: None, or one that did not write, stands for the first.
            where: the checkpoint, for messages.

        Raises:
            CheckpointFormatError: two ranks describe one tensor differently, or part of it is
                missing.
        """
        found: dict[str, TensorEntry] = {}
        chunks: dict[str, list[Chunk]] = {}
        for name, entry in (e for r in self.ranks for e in r.tensors.items()):
            before = found.setdefault(name, entry)
            check_same(name, before, entry, where)
            chunks.setdefault(name, []).extend(entry.chunks)
        found = {name: replace(e, chunks=tuple(chunks[name])) for name, e in found.items()}
        for name, entry in found.items():
            check_whole(name, entry, where)
        if rank is not None and rank < len(self.ranks):
            found |= self.ranks[rank].own
        return found


def check_same(name: str, a: TensorEntry, b: TensorEntry, where: str) -> None:
    """Raises unless two ranks have written parts of one and the same tensor.

    Raises:
        CheckpointFormatError: they describe it differently.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        raise CheckpointFormatError(
            f"{where}: {name} is {a.dtype} {list(a.shape)} of one rank and {b.dtype} "
            f"{list(b.shape)} of another. Use another checkpoint"
        )


def check_together(ranks: Iterable[RankManifest], save: str, where: str) -> Shares:
    """The shares of one save, in order of the ranks.

    Raises:
        CheckpointFormatError: one is of another save or rank, or two name one file.
    """
    found = tuple(ranks)
    files = [name for r in found for name in r.files]
    for number, manifest in enumerate(found):
        if manifest.rank != number or manifest.save != save:
            raise CheckpointFormatError(
                f"{where}: what should be the share of rank {number} is that of rank "
                f"{manifest.rank} of another save; files of different checkpoints may have been "
                "mixed. Use another checkpoint"
            )
    if len(set(files)) != len(files):
        raise CheckpointFormatError(f"{where}: two ranks wrote one file. Use another checkpoint")
    return Shares(found)
