"""Which ranks see one and the same folder, and how files go from there to where others look.

A node is whoever sees a folder: on machines of a cluster, the ranks of one machine. Files go from
rank to rank, over a group of gloo's that nobody else uses: no collective, so that who trains on
meanwhile waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from actckpt.checkpoint.files import Files, Sink
from actckpt.checkpoint.names import SAVING, unique
from actckpt.errors import CheckpointError
from actckpt.sharded.exchange import Exchange

logger = logging.getLogger("actckpt")

# what the ranks are in meanwhile, for messages
_CALL = "the first use of tiers="
PIECE_BYTES = 32 << 20
_MOST_S = 300.0


class Nodes:
    """The nodes of a run by one folder; every rank has to make it, with its own node's folder.

    Args:
        folder: of this rank's node; made if it does not exist.

    Attributes:
        ranks: of each node, in order of their first ranks.
        here: the number of this rank's.

    Raises:
        CheckpointError: a rank cannot write into its folder; raised on every rank.
    """

    def __init__(self, exchange: Exchange, files: Files, folder: str) -> None:
        self._exchange = exchange
        self._files = files
        name, error = unique(SAVING, f"node-of-{exchange.rank}"), ""
        try:
            files.make_directories(folder)
            with files.writing(f"{folder}/{name}"):
                pass
        except OSError as found:
            error = f"{folder} cannot be written: {found}"
        said = exchange.calls.gather(_CALL, [name, error])
        for rank, (_, text) in enumerate(said):
            if text:
                raise CheckpointError(f"rank {rank}: {text}")
        seen = [r for r, (n, _) in enumerate(said) if files.status(f"{folder}/{n}") is not None]
        firsts = exchange.calls.gather(_CALL, min(seen))
        with suppress(OSError):
            files.remove_tree(f"{folder}/{name}")
        nodes: dict[int, list[int]] = {}
        for rank, first in enumerate(firsts):
            nodes.setdefault(first, []).append(rank)
        self.ranks = [*nodes.values()]
        self.here = next(n for n, ranks in enumerate(self.ranks) if exchange.rank in ranks)
        self._group: Any = None
        if len(self.ranks) > 1:
            most_s = min(exchange.patience.most_s, _MOST_S)
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=most_s))

    @property
    def own(self) -> list[int]:
        """The ranks of this node."""
        return self.ranks[self.here]

    @property
    def leader(self) -> int:
        """The rank that alone holds the lock of this node's folder."""
        return self.own[0]

    @property
    def leads(self) -> bool:
        """Whether this rank is that."""
        return self._exchange.rank == self.leader

    @property
    def reaches(self) -> bool:
        """Whether files can go to another node."""
        return self._group is not None

    def cut_off(self) -> None:
        """A transfer has failed, and what comes after it on the same way cannot be told from it."""
        if self._group is not None:
            logger.warning("actckpt: files could not go to another node: each keeps its own alone")
        self._group = None

    def copied_to(self, rank: int) -> int:
        """The rank of the next node that takes a copy of this rank's files."""
        number = next(n for n, ranks in enumerate(self.ranks) if rank in ranks)
        following = self.ranks[(number + 1) % len(self.ranks)]
        return following[self.ranks[number].index(rank) % len(following)]

    def copied_from(self, rank: int) -> list[int]:
        """The ranks whose files this one takes a copy of."""
        return [r for ranks in self.ranks for r in ranks if self.copied_to(r) == rank]

    # ---- files

    def transfer(self) -> Transfer:
        """One exchange of files."""
        return Transfer(self._files, self._group)


class Transfer:
    """Files that go to other ranks and come from them, in the same order on both sides.

    What cannot be read or written here goes and comes all the same, as nothing of use: the other
    side would wait for it. `end` raises what was the matter.
    """

    def __init__(self, files: Files, group: Any) -> None:
        self._files = files
        self._group = group
        self._sending: list[tuple[int, Any]] = []
        self._error: Exception | None = None

    def send(self, path: str, size_bytes: int, to: int) -> None:
        """Begins to send a file."""
        data = torch.zeros(0, dtype=torch.uint8)
        try:
            if size_bytes:
                data = torch.from_file(path, size=size_bytes, dtype=torch.uint8)
        except Exception as error:  # the kind is torch's
            self._failed(error)
            data = torch.zeros(size_bytes, dtype=torch.uint8)
        for piece in data.split(PIECE_BYTES) if size_bytes else ():
            with self._reached(to):
                self._sending.append((to, dist.isend(piece, to, group=self._group)))

    def receive(self, path: str, size_bytes: int, sender: int) -> str:
        """The checksum of a new file of what another rank sends; "" where none was written."""
        sink: Sink | None = None
        left = size_bytes
        piece = torch.empty(min(left, PIECE_BYTES), dtype=torch.uint8)
        with ExitStack() as writing:
            try:
                sink = writing.enter_context(self._files.writing(path))
            except OSError as error:
                self._failed(error)
            while left:
                part = piece[: min(left, PIECE_BYTES)]
                with self._reached(sender):
                    dist.recv(part, sender, group=self._group)
                left -= part.numel()
                try:
                    if sink is not None:
                        sink.write(part.numpy().data)
                except OSError as error:
                    self._failed(error)
                    sink = None
        return "" if sink is None else sink.checksum

    def end(self) -> None:
        """Returns when all is sent.

        Raises:
            Exception: what could not be read or written.
            CheckpointError: another rank could not be reached.
        """
        for to, work in self._sending:
            with self._reached(to):
                work.wait()
        if self._error is not None:
            raise self._error

    def _failed(self, error: Exception) -> None:
        self._error = self._error or error

    @contextmanager
    def _reached(self, rank: int) -> Iterator[None]:
        """What gloo raises says one thing: that rank is not there."""
        try:
            yield
        except RuntimeError as error:
            raise CheckpointError(
                f"files could not go to or from rank {rank}: {error!s:.200}"
            ) from error
