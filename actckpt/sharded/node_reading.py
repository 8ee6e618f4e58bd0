"""A checkpoint whose files lie in the folders of several nodes: found, and brought together.

The files of a node that is lost are in the folder of the next one, too. What this node's ranks need
and its folder lacks comes from whoever has it, over `Nodes`; every file was verified before it is
sent, and is compared again where it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actckpt.checkpoint.commit import free_name
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import MANIFEST, SAVING, rank_file, state_file, unique
from actckpt.checkpoint.verification import read_share, read_shares, verify_share
from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.nodes import Nodes


@dataclass(frozen=True, slots=True)
class Spread:
    """One checkpoint, wherever its files lie.

    Args:
        names: by node, what it is called there.
        shares: by node, the ranks whose files are there and sound.
    """

    manifest: Manifest
    names: dict[int, str]
    shares: dict[int, frozenset[int]]

    @property
    def lost(self) -> list[int]:
        """The ranks whose files are nowhere."""
        there = {rank for ranks in self.shares.values() for rank in ranks}
        return [rank for rank in range(self.manifest.world_size) if rank not in there]


# what the ranks are in meanwhile, for messages
_CALL = "reading what the nodes have"
# a file, what it is, and from which node to which it goes
_Move = tuple[str, FileEntry, int, int]


class NodeReading:
    """What is in the folders of all nodes; every rank makes the same calls.

    Args:
        folder: of this rank's node.
    """

    def __init__(self, nodes: Nodes, exchange: Exchange, files: Files, folder: str) -> None:
        self._nodes = nodes
        self._exchange = exchange
        self._files = files
        self._folder = folder

    def look(self, checkpoints: Iterable[Checkpoint]) -> list[Spread]:
        """What there is, newest first, the same on every rank.

        Args:
            checkpoints: in this node's folder.
        """
        nodes = self._nodes
        said = [
            {
                "save": c.manifest.save,
                "name": c.path.name,
                "manifest": c.manifest.to_bytes().decode() if nodes.leads else "",
                "sound": self._sound(c),
            }
            for c in checkpoints
            if c.manifest.world_size
        ]
        found: dict[str, Spread] = {}
        for rank, entries in enumerate(self._exchange.calls.gather(_CALL, said)):
            number = next(n for n, ranks in enumerate(nodes.ranks) if rank in ranks)
            for entry in entries:
                save = entry["save"]
                if save not in found and entry["manifest"]:
                    manifest = Manifest.from_bytes(entry["manifest"].encode(), entry["name"])
                    found[save] = Spread(manifest, {}, {})
                if save in found:
                    spread = found[save]
                    spread.names[number] = entry["name"]
                    before = spread.shares.get(number, frozenset())
                    spread.shares[number] = before | {*entry["sound"]}
        return sorted(found.values(), key=lambda s: s.manifest.serial, reverse=True)

    def _sound(self, checkpoint: Checkpoint) -> list[int]:
        """The shares that are here, of those that this rank looks at for its node."""
        own, path = self._nodes.own, str(checkpoint.path)
        mine = range(checkpoint.manifest.world_size)[own.index(self._exchange.rank) :: len(own)]
        found = []
        for rank in mine:
            try:
                name = rank_file(rank)
                share = read_share(self._files, path, name, checkpoint.manifest.files)
                verify_share(self._files, path, share)
                found.append(rank)
            except CheckpointError:
                continue  # another node may have it
        return found

    def bring(self, spread: Spread, needed: Callable[[str], Iterable[str]]) -> Path:
        """Where this node has of a checkpoint what its ranks need.

        Args:
            needed: for its folder here the files of tensors that this rank reads, once all that
                is no tensor is there.

        Raises:
            CheckpointError: it could not be brought here; raised on every rank.
        """
        manifest, world = spread.manifest, range(spread.manifest.world_size)
        there = self._folder_of(spread)
        missing = {
            node: [r for r in world if r not in spread.shares.get(node, ())]
            for node in range(len(self._nodes.ranks))
        }

        def moves(node: int, files: Iterable[tuple[int, str, FileEntry]]) -> list[_Move]:
            return [(name, entry, self._having(spread, rank), node) for rank, name, entry in files]

        self._move(
            there,
            [
                move
                for node, ranks in missing.items()
                for move in moves(
                    node, [(r, rank_file(r), manifest.files[rank_file(r)]) for r in ranks]
                )
            ],
        )
        shares = self._on_all(lambda: read_shares(self._files, there, manifest)).ranks
        self._move(
            there,
            [
                move
                for node, ranks in missing.items()
                for move in moves(
                    node,
                    [
                        (r, state_file(r), shares[r].files[state_file(r)])
                        for r in ranks
                        if state_file(r) in shares[r].files
                    ],
                )
            ],
        )
        wanted = self._exchange.calls.gather(_CALL, self._on_all(lambda: sorted(needed(there))))
        owners = {name: r for r, share in enumerate(shares) for name in share.files}
        last: list[_Move] = []
        for node, ranks in missing.items():
            names = sorted({name for rank in self._nodes.ranks[node] for name in wanted[rank]})
            here = [n for n in names if owners[n] in ranks]
            last += moves(node, [(owners[n], n, shares[owners[n]].files[n]) for n in here])
        self._move(there, last)
        return Path(there)

    @staticmethod
    def _having(spread: Spread, rank: int) -> int:
        return next(node for node, ranks in sorted(spread.shares.items()) if rank in ranks)

    def _folder_of(self, spread: Spread) -> str:
        """The checkpoint's folder on this node, made where there is none."""
        here = spread.names.get(self._nodes.here, "")

        def made() -> str:
            if here or not self._nodes.leads:
                return here
            files = self._files
            temporary = f"{self._folder}/{unique(SAVING, 'brought')}"
            files.make_directories(temporary)
            with files.writing(f"{temporary}/{MANIFEST}") as sink:
                sink.write(spread.manifest.to_bytes())
            files.sync_directory(temporary)
            name = free_name(files, self._folder, spread.manifest.step)
            files.rename(temporary, f"{self._folder}/{name}")
            files.sync_directory(self._folder)
            return name

        names = self._exchange.calls.gather(_CALL, self._on_all(made))
        return f"{self._folder}/{names[self._nodes.leader]}"

    def _move(self, there: str, moves: list[_Move]) -> None:
        """Has files go from one node's folder to another's.

        Raises:
            CheckpointError: one did not; on every rank.
        """
        moves = [move for move in moves if move[2] != move[3]]
        if moves:
            self._on_all(lambda: self._moved(there, moves), cuts_off=True)

    def _moved(self, there: str, moves: list[_Move]) -> None:
        nodes, rank = self._nodes, self._exchange.rank
        if not nodes.reaches:
            raise CheckpointError("files cannot go to another node any more, since one could not")
        transfer, came = nodes.transfer(), []
        for number, (name, entry, source, target) in enumerate(moves):
            sender = nodes.ranks[source][number % len(nodes.ranks[source])]
            receiver = nodes.ranks[target][number % len(nodes.ranks[target])]
            if rank == sender:
                transfer.send(f"{there}/{name}", entry.size_bytes, receiver)
            elif rank == receiver:
                temporary = f"{self._folder}/{unique(SAVING, name)}"
                checksum = transfer.receive(temporary, entry.size_bytes, sender)
                came.append((temporary, name, checksum == entry.checksum, sender))
        transfer.end()
        for temporary, name, sound, sender in came:
            if not sound:
                raise CheckpointFormatError(f"{name} of rank {sender} came as another")
            self._files.rename(temporary, f"{there}/{name}")

    def _on_all(self, work: Callable[[], Any], *, cuts_off: bool = False) -> Any:
        """What the work gives, once it has gone well on every rank.

        Raises:
            CheckpointError: what it raised on one; on every rank.
        """
        found, error = None, ""
        try:
            found = work()
        except Exception as raised:  # the others wait for a word of this rank, whatever it is
            error = str(raised) or type(raised).__name__
        for rank, text in enumerate(self._exchange.calls.gather(_CALL, error)):
            if text:
                if cuts_off:
                    self._nodes.cut_off()
                raise CheckpointFormatError(f"rank {rank}: {text}")
        return found
