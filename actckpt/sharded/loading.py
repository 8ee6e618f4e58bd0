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
from actckpt.checkpoint.manifest import Chunk, Manifest, TensorEntry
from actckpt.checkpoint.names import state_file
from actckpt.checkpoint.rank_manifest import Shares
from actckpt.checkpoint.tensor_file import bytes_of, read_slots
from actckpt.checkpoint.united import PER_RANK, united_items
from actckpt.checkpoint.verification import (
    as_written,
    check_slots,
    checked,
    read_shares,
    state_trees,
)
from actckpt.checkpoint.verified_file import VerifiedFile, verified_file
from actckpt.errors import CheckpointFormatError

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
    ) -> None:
        self._files = files
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

    def _trees(self, shares: Shares) -> dict[str, Any]:
        own = shares.ranks[self._rank : self._rank + 1]
        others = [
            r for r in shares.ranks if r not in own and (r.rank == 0 or {*r.trees} - {*PER_RANK})
        ]
        found = []
        for share in (*own, *others):
            file = state_file(share.rank)
            if file in share.files:
                where = f"{self._directory}/{file}"
                with checked(self._files, where, share.files[file]) as source:
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
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            chunk = chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for file, wanted in by_file.items():
            where = f"{self._directory}/{file}"
            entry, blocks = shares.file(file)
            owner = next(r for r in shares.ranks if file in r.files)
            with verified_file(self._files, where, entry, blocks) as opened, as_written():
                slots = read_slots(opened, where)
                tensors = [*owner.tensors.values(), *owner.own.values()]
                check_slots(slots, file, tensors, where)
                begins = {slot.name: opened.read_bytes + slot.begin for slot in slots}
                # in the order in which they lie there, so that each block is fetched once
                for item, chunk in sorted(wanted, key=lambda w: begins[w[1].name]):
                    dtype = BY_NAME[entries[item.storage_index.fqn].dtype]
                    piece = _read_rows(opened, begins[chunk.name], chunk, dtype, item)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
                self.fetched_bytes += opened.fetched_bytes


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


def _read_rows(
    file: VerifiedFile, begin: int, chunk: Chunk, dtype: torch.dtype, item: ReadItem
) -> torch.Tensor:
    """The part of a chunk that is wanted: its rows are read, and cut where they are longer."""
    first, count = (item.storage_offsets[0], item.lengths[0]) if chunk.shape else (0, 1)
    row = chunk.shape[1:]
    rows = torch.empty((count, *row) if chunk.shape else (), dtype=dtype)
    if rows.numel():
        file.read_at(begin + first * math.prod(row) * dtype.itemsize, bytes_of(rows))
    for dim in range(1, len(chunk.shape)):
        rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    return rows
