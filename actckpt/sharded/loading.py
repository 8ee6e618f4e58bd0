"""A rank's share of a checkpoint, whatever the world that wrote it: planned by torch, read here."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from actckpt.checkpoint.decoding import decode
from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Manifest, TensorEntry
from actckpt.checkpoint.names import state_file
from actckpt.checkpoint.rank_manifest import Shares
from actckpt.checkpoint.united import PER_RANK, united_items
from actckpt.checkpoint.verification import (
    as_written,
    checked,
    read_shares,
    state_trees,
)
from actckpt.errors import CheckpointFormatError
from actckpt.sharded.pieces import PiecesOf, Wanted, read_once
from actckpt.sharded.reading_once import FilesOnce, ReadingOnce

# the distributed tensor of a run that one of an item is to be cut like, if any
Like = Callable[[str, str, tuple[int, ...]], Any]


class ShareReading:
    """What one rank needs of a checkpoint of many.

    Args:
        rank: this one's; the one that had this number has written what is every rank's own.
        like: for (item, name, shape) of a tensor, the distributed tensor it is to be cut like;
            None for a plain one.
        joined: items of which what all ranks had is one state; of any other this rank takes what
            it had, or else what the first had. None is all.
        once: through which all ranks read this together, every block once; None reads alone.
        same_world: this rank is one of those that saved, and takes nothing that it did not have,
            not even of ``joined``.

    Attributes:
        shares: what all ranks wrote, once `items` was asked.
        fetched_bytes: what was read of files of tensors.
    """

    def __init__(
        self,
        files: Files,
        directory: str,
        manifest: Manifest,
        *,
        rank: int,
        like: Like,
        joined: Container[str] | None = None,
        same_world: bool = False,
        once: ReadingOnce | None = None,
    ) -> None:
        self._once = once
        self._plain = files
        self._together = None if once is None else FilesOnce(files, once)
        self._files = files if self._together is None else self._together
        self._directory = directory
        self._manifest = manifest
        self._rank = rank
        self._like = like
        self._joined = joined
        self._same_world = same_world
        self.fetched_bytes = 0
        self.shares = Shares(())

    def items(self) -> dict[str, Any]:
        """The items, every byte that was read verified.

        Raises:
            CheckpointFormatError: as `verify_files`, of what is read.
        """
        if self._together is not None:
            self._together.fetch(self._manifest.files, self._manifest.files)
        shares = self.shares = read_shares(self._files, self._directory, self._manifest)
        trees = self._trees(shares)
        entries = shares.tensors(self._rank, self._directory)
        where = self._directory
        with as_written():
            targets = {
                name: self._target(item, key, _known(entries, name, where))
                for item, tree in trees.items()
                for key in names_in(tree)
                for name in (f"{item}/{key}",)
            }
            needed = {name: entries[name] for name in targets}
            plan, planner = planned(targets, needed)
        self._read(shares, needed, plan, planner)
        with as_written():
            check_covered(targets, plan, where)
            return {
                item: decode(tree, {k: targets[f"{item}/{k}"] for k in names_in(tree)}, where)
                for item, tree in trees.items()
            }

    def needed_files(self) -> set[str]:
        """The files of tensors that `items` reads; the others of the checkpoint may be missing.

        Raises:
            CheckpointFormatError: as `items`.
        """
        shares = self.shares = read_shares(self._files, self._directory, self._manifest)
        entries = shares.tensors(self._rank, self._directory)
        targets = {
            name: self._target(item, key, _known(entries, name, self._directory))
            for item, tree in self._trees(shares).items()
            for key in names_in(tree)
            for name in (f"{item}/{key}",)
        }
        plan, _ = planned(targets, {name: entries[name] for name in targets})
        chunks = {(n, c.offset): c.file for n in targets for c in entries[n].chunks}
        return {
            chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            for item in plan.items
        }

    def _trees(self, shares: Shares) -> dict[str, Any]:
        own = shares.ranks[self._rank : self._rank + 1]
        others = [
            r for r in shares.ranks if r not in own and (r.rank == 0 or {*r.trees} - {*PER_RANK})
        ]
        found = []
        entries = {
            file: share.files[file]
            for share in (*own, *others)
            for file in (state_file(share.rank),)
            if file in share.files
        }
        if self._together is not None:
            self._together.fetch(entries, entries)
        for file, entry in entries.items():
            where = f"{self._directory}/{file}"
            with checked(self._files, where, entry) as source:
                found.append(state_trees(source, where))
        mine = own[0] if own else shares.ranks[0]
        had = {*shares.ranks[0].trees}.difference(mine.without).union(mine.trees)
        everybodys = () if self._same_world else self._joined
        return {
            item: tree
            for item, tree in united_items(found, self._joined).items()
            if item in had or everybodys is None or item in everybodys
        }

    def _target(self, item: str, key: str, entry: TensorEntry) -> torch.Tensor:
        """Memory for what this rank needs of a tensor."""
        dtype = BY_NAME[entry.dtype]
        like = self._like(item, key, entry.shape)
        if like is None or tuple(like.shape) != entry.shape:
            return torch.empty(entry.shape, dtype=dtype)
        local = torch.empty(like.to_local().shape, dtype=dtype)
        return DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def _read(
        self,
        shares: Shares,
        entries: Mapping[str, TensorEntry],
        plan: LoadPlan,
        planner: DefaultLoadPlanner,
    ) -> None:
        chunks = {(name, c.offset): c for name, e in entries.items() for c in e.chunks}
        by_file: dict[str, list[Wanted]] = {}
        for item in plan.items:
            chunk = chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            dtype = BY_NAME[entries[item.storage_index.fqn].dtype]
            by_file.setdefault(chunk.file, []).append(Wanted(item, chunk, dtype))
        pieces = [
            PiecesOf(self._plain, self._directory, file, shares, wanted)
            for file, wanted in sorted(by_file.items())
        ]

        def take(item: ReadItem, piece: torch.Tensor) -> None:
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)

        if self._once is not None:
            read_once(self._once, pieces, take)
            self.fetched_bytes += self._once.fetched_bytes
        else:
            for part in pieces:
                part.read(None, take)
        self.fetched_bytes += sum(part.fetched_bytes for part in pieces)


def names_in(tree: Any) -> Iterator[str]:
    """The tensors that a tree refers to."""
    if isinstance(tree, list):
        for part in tree:
            yield from names_in(part)
    elif isinstance(tree, dict):
        tag = next(iter(tree), "")
        if tag in ("$tensor", "$shard", "$ndarray"):
            yield tree[tag]
        else:
            for part in tree.values():
                yield from names_in(part)


def planned(
    targets: dict[str, Any], entries: Mapping[str, TensorEntry]
) -> tuple[LoadPlan, DefaultLoadPlanner]:
    """What to read for these targets, by torch's planner."""
    metadata = Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(BY_NAME[entry.dtype]),
                torch.Size(entry.shape),
                [
                    ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape))
                    for c in entry.chunks
                ],
            )
            for name, entry in entries.items()
        }
    )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(targets, metadata, is_coordinator=False)
    return planner.finish_plan(planner.create_local_plan()), planner


def check_covered(targets: Mapping[str, torch.Tensor], plan: LoadPlan, where: str) -> None:
    """Raises unless what was read makes up every target, each element once.

    Raises:
        CheckpointFormatError: chunks overlap, or leave a gap.
    """
    by_name: dict[str, list[ReadItem]] = {}
    for item in plan.items:
        by_name.setdefault(item.dest_index.fqn, []).append(item)
    for name, target in targets.items():
        shape = target.to_local().shape if isinstance(target, DTensor) else target.shape
        items = by_name.get(name, [])
        whole = sum(math.prod(item.lengths) for item in items) == math.prod(shape)
        if whole and len(items) > 1:
            covered = torch.zeros(shape, dtype=torch.bool)
            for item in items:
                box = zip(item.dest_offsets, item.lengths, strict=True)
                covered[tuple(slice(o, o + n) for o, n in box)] = True
            whole = bool(covered.all())
        if not whole:
            raise CheckpointFormatError(f"{where}: {name} has chunks that overlap or leave gaps")


def _known(entries: Mapping[str, TensorEntry], name: str, where: str) -> TensorEntry:
    if name not in entries:
        raise CheckpointFormatError(f"{where} has no tensor {name}, which its state names")
    return entries[name]
