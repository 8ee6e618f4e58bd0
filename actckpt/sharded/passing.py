"""Blocks sent from one rank to others over the process group, while nobody waits for the dead.

A message is a block, the digest that its sender found, and whether it could be read at all: who
cannot read goes on to send, so that nobody waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from actckpt.checkpoint.digest import BLOCK_DIGEST_BYTES, digest_of_block
from actckpt.checkpoint.tensor_file import bytes_of
from actckpt.errors import CheckpointError
from actckpt.sharded.exchange import Exchange

_LOOK_S = 0.2
# what the run itself sends from rank to rank has others
_TAG = 0x61637470


class UnreadError(CheckpointError):
    """Another rank could not read what it was to read for this one, and says why itself."""


def can_pass() -> bool:
    """Whether the default process group carries what lies in the memory of the host."""
    if not dist.is_initialized():
        return False
    backends: Any = dist.get_backend_config()
    return "cpu:gloo" in str(backends) or "cpu:mpi" in str(backends)


class Parcel:
    """Memory for one message.

    Attributes:
        block: the part of it for the block.
    """

    def __init__(self, size_bytes: int) -> None:
        self.tensor = torch.zeros(size_bytes + BLOCK_DIGEST_BYTES + 1, dtype=torch.uint8)
        self._all = bytes_of(self.tensor)
        self.block = self._all[:size_bytes]
        self._tail = self._all[size_bytes:]

    def seal(self) -> None:
        """The block is what is to be sent."""
        self._tail[:-1] = digest_of_block(self.block)
        self._tail[-1] = 1

    def check(self, reader: int, what: str) -> None:
        """Raises unless what came is what was read.

        Raises:
            UnreadError: nothing could be.
            CheckpointError: it is something else.
        """
        if self._tail[-1] == 0:
            raise UnreadError(f"rank {reader} could not read {what}")
        if self._tail[-1] != 1 or bytes(self._tail[:-1]) != digest_of_block(self.block):
            raise CheckpointError(
                f"{what} came otherwise than rank {reader} read it: what carries the messages of "
                "the process group changes them"
            )


Post = tuple[Parcel, int]


def passed(sends: Sequence[Post], receives: Sequence[Post], alive: Callable[[], None]) -> None:
    """Sends and receives, all at once; returns when all is through.

    Args:
        sends, receives: each to or from a rank. Two ranks must have theirs for one another in one
            order.
        alive: called again and again meanwhile; what it raises ends the wait.

    Raises:
        CheckpointError: the process group failed.
    """
    if not sends and not receives:
        return
    failed: list[BaseException] = []
    ended = threading.Event()

    def wait() -> None:
        try:
            works = [dist.irecv(parcel.tensor, src=rank, tag=_TAG) for parcel, rank in receives]
            works += [dist.isend(parcel.tensor, dst=rank, tag=_TAG) for parcel, rank in sends]
            for work in works:
                if work is not None:
                    work.wait()
        except BaseException as error:
            failed.append(error)
        ended.set()

    # no signal and no time-out reaches one that waits there
    threading.Thread(target=wait, name="actckpt-passing", daemon=True).start()
    while not ended.wait(_LOOK_S):
        alive()
    if failed:
        alive()
        raise CheckpointError(
            f"the process group failed while ranks sent one another what they had read: "
            f"{failed[0]!s:.200}"
        ) from failed[0]


class Watch:
    """Whether all ranks are there, and none has left what all do together.

    Args:
        key: under which one that leaves says so.
    """

    def __init__(self, exchange: Exchange, key: str) -> None:
        self._exchange, self._key = exchange, key

    def __call__(self) -> None:
        """Raises if not.

        Raises:
            CheckpointError: one does not run any more, or has left.
        """
        self._exchange.check_alive()
        said = self._exchange.ask(self._key)
        if said is not None:
            raise CheckpointError(said)

    def leave(self, error: BaseException) -> None:
        """This rank takes no further part."""
        if self._exchange.ask(self._key) is None:
            self._exchange.tell(self._key, f"rank {self._exchange.rank}: {error}")
