"""Simulated ranks in one process, each in a thread, over a store in memory: what they say counts.

What they hold is made up: parts of tensors that are cut in rows, and whole ones.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from actckpt.checkpoint.digest import Digest, checksum_of
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.encoding import Encoded, Shard
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.names import rank_file, share_file, state_file
from actckpt.checkpoint.rank_manifest import RankManifest
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.checkpoint.tensor_file import bytes_of
from actckpt.sharded import committing, share_writing, waiting
from actckpt.sharded.assignment import Assignment
from actckpt.sharded.committing import SaveTogether
from actckpt.sharded.exchange import Exchange, Seat
from actckpt.sharded.known import Known
from actckpt.sharded.passing import Parcel
from actckpt.sharded.waiting import Patience

Items = Mapping[str, Encoded]


def mesh(world: int, *, replicas: bool = False) -> Any:
    """As far as anybody asks a distributed tensor for it."""
    placement = SimpleNamespace(is_shard=lambda: not replicas)
    return SimpleNamespace(device_mesh=SimpleNamespace(size=lambda: world), placements=(placement,))


def rows(tensor: torch.Tensor, rank: int, world: int) -> tuple[torch.Tensor, Shard]:
    """A rank's part of one that all ranks cut in rows, evenly."""
    count = len(tensor) // world
    offset = (rank * count, *(0,) * (tensor.dim() - 1))
    shard = Shard(tuple(tensor.shape), offset, mesh(world))
    return tensor[rank * count : (rank + 1) * count], shard


def encoded(
    whole: Mapping[str, torch.Tensor],
    cut: Mapping[str, tuple[torch.Tensor, Shard]] | None = None,
    **plain: Any,
) -> Encoded:
    """An item of whole tensors, of parts, and of plain data."""
    parts = cut or {}
    tree = {
        **{name: {"$tensor": name} for name in whole},
        **{name: {"$shard": name, "placements": ["S(0)"]} for name in parts},
        **plain,
    }
    tensors = {**whole, **{name: part for name, (part, _) in parts.items()}}
    return Encoded(tree, tensors, {name: shard for name, (_, shard) in parts.items()})


def snapshot(step: int, items: Items) -> Snapshot:
    """What a rank saves."""
    return Snapshot(step, items, "", {}, "", {})


# hundreds of threads are slow to have their turn
PATIENT = Patience(600.0, 3600.0)


class Fleet:
    """So many ranks, each with what it remembers of saves.

    Args:
        store: that they talk over; one in memory by default.
        ranks: which of them are here.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        *,
        store: Callable[[], Any] | None = None,
        ranks: Sequence[int] | None = None,
        patience: Patience | None = None,
    ) -> None:
        memory: Any = dist.HashStore()  # type: ignore[attr-defined]
        connect = store or (lambda: memory)

        def named(prefix: str) -> Any:
            return dist.PrefixStore(prefix, connect())  # type: ignore[attr-defined]

        self.folder = folder
        self.ranks = range(world) if ranks is None else ranks
        self.exchanges = {
            rank: Exchange(patience or PATIENT, Seat(rank, world, "fleet", named))
            for rank in self.ranks
        }
        self.known = {rank: Known() for rank in self.ranks}
        self._serial = 0

    def save(self, step: int, items: Callable[[int], Items]) -> dict[int, Checkpoint | Exception]:
        """What every rank got from one save."""
        self._serial += 1
        return self.each(lambda rank: self.of_rank(rank, step, items(rank)))

    def each(self, work: Callable[[int], Any]) -> dict[int, Any]:
        """What all ranks get from their part of something, or raise."""
        found: dict[int, Any] = {}

        def one(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def of_rank(self, rank: int, step: int, items: Items) -> Checkpoint:
        """One rank's part of a save."""
        return SaveTogether(
            self.exchanges[rank],
            Files(),
            str(self.folder),
            snapshot(step, items),
            self.known[rank],
            key=f"save/{step}.{self._serial}",
            prepare=lambda: self._serial,
            begun=lambda serial: None,
            settled=lambda: None,
            verify="full",
        ).run()


@contextmanager
def looking_rarely() -> Iterator[None]:
    """Hundreds of ranks that look for messages as often as a few keep every core busy."""
    with mock.patch.object(waiting, "_MOST_S", 1.0):
        yield


_CONTENT = b"x" * 64
_WRITTEN: dict[tuple[int, Assignment], str] = {}
_SAVE = re.compile(r'\n "save": "[0-9a-f]*"')


@contextmanager
def manifests_only() -> Iterator[None]:
    """Ranks write manifests as they are, and 64 bytes in place of every other file."""
    with mock.patch.object(committing, "write_share", _stand_in):
        yield


def _stand_in(
    files: Files,
    directory: str,
    what: Snapshot,
    assignment: Assignment,
    *,
    rank: int,
    save: str,
    verify: str,
) -> tuple[None, FileEntry]:
    digest = Digest()
    digest.update(_CONTENT)
    names = [share_file(item, rank) for item in what.items]
    names += [state_file(rank)] if assignment.trees else []
    for name in names:
        Path(directory, name).write_bytes(_CONTENT)
    body = _WRITTEN.get((rank, assignment))
    if body is None:
        skipped = {*assignment.skipped}
        described: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        for item, found in what.items.items():
            for key in found.tensors:
                name = f"{item}/{key}"
                entry = share_writing._entry(found, key, share_file(item, rank))
                if name not in skipped and entry is not None:
                    described[name in assignment.own][name] = entry
        share = RankManifest(
            rank,
            "",
            dict.fromkeys(names, FileEntry(len(_CONTENT), digest.checksum)),
            dict.fromkeys(names, digest.blocks),
            assignment.trees,
            dict(sorted(described[False].items())),
            described[True],
            assignment.without,
        )
        body = share.to_bytes().decode().rpartition(',\n "checksum": ')[0]
        _WRITTEN[rank, assignment] = body
    body = _SAVE.sub(f'\n "save": "{save}"', body, count=1)
    text = f'{body},\n "checksum": "{checksum_of(body.encode())}"\n}}\n'.encode()
    with files.writing(f"{directory}/{rank_file(rank)}") as sink:
        sink.write(text)
    return None, FileEntry(sink.written_bytes, sink.checksum)


class Post:
    """What carries blocks from thread to thread, in place of a process group."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._queues: dict[tuple[int, int], queue.SimpleQueue[bytes]] = defaultdict(
            queue.SimpleQueue
        )
        self._guard = threading.Lock()
        # of every message the sender, the receiver and the bytes
        self.changes: Callable[[int, int, bytes], bytes] = lambda source, to, data: data

    def of(self, rank: int) -> None:
        """This thread is that rank."""
        self._here.rank = rank

    def passed(
        self,
        sends: Sequence[tuple[Parcel, int]],
        receives: Sequence[tuple[Parcel, int]],
        alive: Callable[[], None],
    ) -> None:
        """As `actckpt.sharded.passing.passed`."""
        me = self._here.rank
        for parcel, rank in sends:
            data = self.changes(me, rank, bytes(bytes_of(parcel.tensor)))
            self._between(me, rank).put(data)
        for parcel, rank in receives:
            while True:
                with suppress(queue.Empty):
                    bytes_of(parcel.tensor)[:] = self._between(rank, me).get(timeout=0.1)
                    break
                alive()

    def _between(self, source: int, to: int) -> queue.SimpleQueue[bytes]:
        with self._guard:
            return self._queues[source, to]
