"""What ranks tell one another through the key-value store of their process group.

No collective: who waits here can give up, and knows whom it waited for. A rank beats for as long as
its process runs, so that one that was killed or stopped is told from one that is slow.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from actckpt.errors import CheckpointError
from actckpt.sharded.calls import Calls
from actckpt.sharded.line import Line
from actckpt.sharded.meeting import Hello, welcome
from actckpt.sharded.waiting import Patience, RankSilentError, Waiting, listed
from actckpt.sharded.whereabouts import Look

logger = logging.getLogger("actckpt")

# a store of torch's refuses values of 8 MiB
_PIECE_CHARS = 4 << 20
# of the exchanges of a process group
_NUMBERS: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Seat:
    """Which rank of how many this is, where they meet, and the store under a name."""

    rank: int
    world_size: int
    place: str
    store: Callable[[str], Any]


class Exchange:
    """Messages between the ranks of the default process group; one for each run.

    Ranks must make theirs in the same order.

    Args:
        seat: None is this process's in that group.

    Attributes:
        calls: what is asked and answered through it in calls that every rank makes.
    """

    def __init__(self, patience: Patience, seat: Seat | None = None) -> None:
        seat = seat or _seat()
        self.rank = seat.rank
        self.world_size = seat.world_size
        self.patience = patience
        self._line = Line()
        self._store_of = seat.store
        self._name, self._hello = "", None
        self._store: Any = None
        self._joining = threading.Lock()
        if self.is_coordinator:
            self._named(secrets.token_hex(8))
            self._answer_all(seat.store(seat.place))
        else:
            self._hello = Hello(self._call_in_time, seat.store(seat.place), self.rank)
        self.calls = Calls(self)
        # keys that are in the store by this rank's hand
        self._told: list[str] = []
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._ends = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank writes what is one for all."""
        return self.rank == 0

    def begin(self) -> None:
        """From now on others see that this process runs."""
        if self._beating is None or not self._beating.is_alive():
            self._join()
            store = self._store_of(self._name)
            self._ends.clear()
            self._beating = threading.Thread(
                target=_beat,
                args=(store, self.rank, self._ends, self.patience.silent_s / 10),
                name="actckpt-beat",
                daemon=True,
            )
            self._beating.start()
            weakref.finalize(self, self._ends.set)
            _BEATING.add(self)

    def end(self) -> None:
        """Nobody is to wait for this process any more."""
        self._ends.set()
        if self._beating is not None:
            # it may wait for a store that has ended
            self._beating.join(1.0)
            self._beating = None

    def tell(self, key: str, message: Any) -> None:
        """Says something to whoever asks for the key, of this rank or of all.

        Raises:
            CheckpointError: the store cannot be reached.
        """
        text = json.dumps(message)
        self._told.append(key)
        pieces = [text[n : n + _PIECE_CHARS] for n in range(0, len(text), _PIECE_CHARS)]
        for number, piece in enumerate(pieces[1:], 1):
            self._told.append(f"{key}/{number}")
            self._call("set", f"{key}/{number}", piece)
        # who sees this one sees the others
        self._call("set", key, f"{len(pieces)} {pieces[0]}")

    def hear(self, key: str, ranks: Iterable[int], look: Look | None = None) -> Any:
        """What was said under a key, once it is.

        Args:
            ranks: who is to say it: if all of them are dead, nobody will.
            look: called now and then while this rank waits.

        Raises:
            RankSilentError: nobody did.
            CheckpointError: the store cannot be reached.
        """
        return self._hear({key: tuple(ranks)}, look)[key]

    def ask(self, key: str) -> Any:
        """What was said under a key; None where nothing was yet."""
        return self._get(key) if self._call("check", [key]) else None

    def hear_all(self, key: str, look: Look | None = None) -> list[Any]:
        """What every rank said under a key of its own, as `tell_all` does.

        Args:
            look: called now and then while this rank waits.

        Raises:
            RankSilentError: a rank did not.
            CheckpointError: the store cannot be reached.
        """
        keys = {rank: f"{key}/of/{rank}" for rank in range(self.world_size)}
        return [*self.hear_from(keys, look).values()]

    def hear_from(self, keys: Mapping[int, str], look: Look | None = None) -> dict[int, Any]:
        """What ranks said, each under a key; as `hear_all`."""
        found = self._hear({key: (rank,) for rank, key in keys.items()}, look)
        return {rank: found[key] for rank, key in keys.items()}

    def tell_all(self, key: str, message: Any) -> None:
        """Says this rank's part of what `hear_all` gathers."""
        self.tell(f"{key}/of/{self.rank}", message)

    def check_alive(self) -> None:
        """Raises unless every rank that was heard of still runs.

        Raises:
            RankSilentError: one does not.
        """
        self._check_heard({f"{r}": (r,) for r in range(self.world_size) if r != self.rank})

    def _hear(self, keys: Mapping[str, tuple[int, ...]], look: Look | None) -> dict[str, Any]:
        """What was said under all of them; hundreds are asked for as fast as one."""
        waiting, looked_s = self._waiting(), time.monotonic()
        awaited = {r for ranks in keys.values() for r in ranks}
        while not self._call("check", [*keys]):
            if time.monotonic() - looked_s > self.patience.silent_s / 20:
                looked_s = time.monotonic()
                missing = self._missing(keys)
                self._check_heard(missing)
                awaited = {r for ranks in missing.values() for r in ranks}
            if look is not None and waiting.is_to_look():
                look(self._missing(keys))
            waiting.pause(awaited - {self.rank})
        firsts = self._call("multi_get", [*keys])
        return {key: self._whole(key, first) for key, first in zip(keys, firsts, strict=True)}

    def _missing(self, keys: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {k: ranks for k, ranks in keys.items() if not self._call("check", [k])}

    def _check_heard(self, missing: Mapping[str, tuple[int, ...]]) -> None:
        """Raises where nobody will say any more what is missing."""
        awaited = {r for ranks in missing.values() for r in ranks}
        silent = self._silent(awaited - {self.rank})
        dead = sorted({r for ranks in missing.values() for r in ranks if silent.issuperset(ranks)})
        if dead:
            raise RankSilentError(
                f"rank {listed(dead)} was not heard of for {self.patience.silent_s:g} s: it "
                "was killed or stopped, or its machine is",
                dead,
            )

    def _waiting(self) -> Waiting:
        return Waiting(self.patience, self._heard.keys())

    def _get(self, key: str) -> Any:
        return self._whole(key, self._call("get", key))

    def _whole(self, key: str, first: bytes) -> Any:
        count, _, text = first.decode().partition(" ")
        rest = (self._call("get", f"{key}/{n}").decode() for n in range(1, int(count)))
        return json.loads("".join([text, *rest]))

    def _silent(self, ranks: Iterable[int]) -> set[int]:
        """Those that have beaten and do so no more."""
        beating = [r for r in ranks if r in self._heard or self._call("check", [f"beat/{r}"])]
        if not beating:
            return set()
        beats = self._call("multi_get", [f"beat/{r}" for r in beating])
        now = time.monotonic()
        for rank, beat in zip(beating, beats, strict=True):
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = beat, now
        return {r for r in beating if now - self._heard[r][1] > self.patience.silent_s}

    def forget(self, prefix: str) -> None:
        """Nobody asks any more for what this rank said under such keys."""
        over = [k for k in self._told if k.startswith(prefix)]
        self._told = [k for k in self._told if not k.startswith(prefix)]
        for key in over:
            self._call("delete_key", key)

    def _named(self, name: str) -> None:
        self._store, self._name, self._hello = self._store_of(name), name, None

    def _answer_all(self, store: Any) -> None:
        """As long as the process runs: what is said under a name must not wait for who is late."""
        if self.world_size > 1:
            ended = threading.Event()
            thread = threading.Thread(
                target=_answer_all,
                args=(store, range(1, self.world_size), self._name, ended),
                name="actckpt-meeting",
                daemon=True,
            )
            thread.start()
            _ANSWERING[thread] = ended

    def _join(self) -> None:
        """Waits for the coordinator to have made its part of this.

        Raises:
            RankSilentError: it did not.
        """
        with self._joining:
            if self._hello is None:
                return
            waiting = self._waiting()
            while (name := self._hello.answer()) is None:
                waiting.pause({0})
            self._named(name)

    def _call(self, method: str, *args: Any) -> Any:
        """Calls the store, under the name that these ranks alone have."""
        self._join()
        return self._call_in_time(getattr(self._store, method), *args)

    def _call_in_time(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._line.call(call, *args, timeout_s=self.patience.silent_s)
        # torch's own classes of this, and what its C++ raises, are RuntimeErrors
        except (RuntimeError, TimeoutError) as error:
            raise CheckpointError(
                f"the store of the process group does not answer: {error!s:.200}. The rank, or the "
                "launcher, that holds it has ended or stopped"
            ) from error


_BEATING: weakref.WeakSet[Exchange] = weakref.WeakSet()
_ANSWERING: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = (
    weakref.WeakKeyDictionary()
)


def _end_all() -> None:
    """A thread in torch's code must not meet the end of the interpreter."""
    for exchange in list(_BEATING):
        exchange.end()
    for thread, ended in list(_ANSWERING.items()):
        ended.set()
        thread.join(1.0)


atexit.register(_end_all)


def _seat() -> Seat:
    """That of this process in the default group."""
    # it may be of another group by now, of which others have made fewer
    numbers = _NUMBERS.setdefault(dist.group.WORLD, itertools.count())
    return Seat(dist.get_rank(), dist.get_world_size(), f"actckpt/{next(numbers)}", _store)


def _store(prefix: str) -> Any:
    """The store under a name of our own, over a connection that nobody else waits for."""
    store: Any = distributed_c10d._get_default_store()
    return distributed_c10d.PrefixStore(prefix, store.clone())


def _answer_all(store: Any, ranks: range, name: str, ended: threading.Event) -> None:
    # the group may end before all have come
    with suppress(RuntimeError):
        welcome(store, ranks, name, ended.wait)


def _beat(store: Any, rank: int, ends: threading.Event, pause_s: float) -> None:
    for number in itertools.count():
        try:
            store.set(f"beat/{rank}", str(number))
        except RuntimeError:
            return  # the group has ended
        if ends.wait(pause_s):
            return
