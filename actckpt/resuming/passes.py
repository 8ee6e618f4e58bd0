"""One pass over a loader: what it began from, how far it is, and how it is begun again there."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.begun_before import drawn_before, forget_begun, is_begun_before
from actckpt.resuming.generators import generators_of
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import (
    datasets_by_epoch,
    generators_given,
    is_indexed,
    is_reused,
    samplers_by_epoch,
    sources_per_batch,
    workers_of,
)
from actckpt.resuming.order import Order, Replay, opened
from actckpt.resuming.random_states import gather_random_states, put_random_states
from actckpt.resuming.sampler_states import NOTHING_KEPT, SamplerStates
from actckpt.resuming.worker_draws import WorkerDraws, of, watched

# a stream that draws is found out at its first batches, or at one of so many; what it draws for
# the very first it draws from what the pass began with, and the same again
_LOOKED_AT = 4
_LOOKED_EVERY = 16


class Pass:
    """How far one pass over a loader is.

    Args:
        epoch: which one it is; of a pass that others than `Checkpointer.steps` make, known once
            a step was made in it.
        watched: somebody else iterates.

    Attributes:
        batch: batches handed out.
        start: what its order was drawn from.
        order: what was drawn; None where nobody could look.
        own: the loader, where its own state is its position.
        draws: the process's random states moved as a stream was read.
        goes_on: it began in the middle, where the run was put back to.
        chain: its batches since the last step, of a watched one.
        ahead: (number of a batch, random states before it was read), where batches are read in
            this process before they are handed out.
        workers: that read it, where it is known whether they draw.
    """

    def __init__(
        self,
        loader: Any,
        samplers: SamplerStates,
        epoch: int,
        batch: int = 0,
        *,
        watched: bool = False,
    ) -> None:
        self.samplers = samplers
        self.epoch = epoch
        self.batch = batch
        self.watched = watched
        self.per_batch = sources_per_batch(loader)
        self.start: dict[str, Any] | None = None
        self.order: Order | None = None
        self.own: Stateful | None = None
        self.draws = False
        self.ahead: deque[tuple[int, dict[str, Any]]] = deque()
        self.ended = False
        self.goes_on = False
        self.chain: BatchChain | None = None
        self.workers: WorkerDraws | None = None

    def read_by(self, workers: WorkerDraws) -> None:
        """These workers read it."""
        self.workers = workers

    def handed_out(self) -> None:
        """One more batch was."""
        self.batch += 1
        if self.order is not None:
            self.order.take(self.per_batch)
        while self.ahead and self.ahead[0][0] < self.batch * self.per_batch:
            self.ahead.popleft()

    def state_dict(self) -> dict[str, Any]:
        """What `reopened` needs, between two batches."""
        if self.own is not None:
            return {"loader": self.own.state_dict()}
        state: dict[str, Any] = {"start": self.start, "draws": self.draws}
        if self.order is not None:
            state["digest"] = self.order.state_dict()
        if self.samplers.samplers:
            state["samplers"] = self.samplers.state_dict()
        if self.workers is not None:
            state["seen"] = self.workers.state_dict()
        if self.ahead:
            state["ahead"] = self.ahead[0][1]
        return state


def begun(
    source: Any,
    begin_iteration: Callable[[], Iterator[Any]],
    made: Pass,
    between: dict[str, Any] | None,
    put_last: Callable[[], None],
) -> Iterator[Any]:
    """An iterator over a whole epoch.

    Args:
        between: what `state_between` found, of the first epoch after a resume.
        put_last: restores the random states, once nothing of the loader's draws any more.
    """
    if between is None and is_begun_before(source):
        return _begun_again(source, begin_iteration, made)
    forget_begun(source)
    was_reused = is_reused(source) if between is None else between["reused"]
    if between is not None:
        _put_generators(source, between)
        made.samplers.put(between.get("samplers", NOTHING_KEPT))

    def begin() -> None:
        put_last()
        if between is not None:
            _put_generators(source, between)
        made.start = _start_of(source, was_reused, made.samplers)

    made.order = Order()
    if is_indexed(source):
        seen = (between or {}).get("seen") if was_reused else None
        begin_iteration = watched(source, begin_iteration, made.read_by, seen)
        if was_reused and not is_reused(source):
            # new workers draw the seed that the old ones would not have drawn
            return opened(source, begin_iteration, made.order, Replay(), begin)
        begin()
        return opened(source, begin_iteration, made.order, Replay())
    begin()
    iterator = begin_iteration()
    if was_reused and not is_reused(source):
        put_last()  # it has drawn a seed that would not have been drawn
    return _Streamed(iterator, source, made)


def begun_later(source: Any, made: Pass) -> None:
    """Its first batch is drawn only now, from random states that have moved since it was opened."""
    if made.start is None or made.order is None or made.order.drawn or not is_indexed(source):
        return
    # as of one that draws no seed of its own any more
    made.start = _start_of(source, True, made.samplers)


def _begun_again(
    source: Any, begin_iteration: Callable[[], Iterator[Any]], made: Pass
) -> Iterator[Any]:
    """An iterator in the place of one that was begun before anybody could look; of its order."""
    generators = generators_of({"loader": source})
    random, drawn = random_states_here(), generators.states()
    iterator = begun(
        source,
        begin_iteration,
        made,
        {"reused": True, "drawn": drawn_before(source)},
        lambda: put_random_states(random),
    )
    generators.put(drawn)
    return iterator


def reopened(
    source: Any,
    begin_iteration: Callable[[], Iterator[Any]],
    made: Pass,
    state: dict[str, Any],
    put_last: Callable[[], None],
    accept: Callable[[], bool],
) -> Iterator[Any]:
    """An iterator over the rest of an epoch, of which ``made.batch`` batches were handed out.

    Raises:
        CheckpointMismatchError: what is left out is not what was handed out.
    """
    start = made.start = state["start"]
    count = made.batch * made.per_batch
    replay = Replay(count, state.get("digest"), accept)
    made.order, made.draws = Order(), bool(state.get("draws"))
    forget_begun(source)

    def last() -> None:
        made.samplers.put(state.get("samplers", NOTHING_KEPT))
        put_last()

    made.samplers.put(start.get("samplers", NOTHING_KEPT))
    if is_indexed(source):
        # workers that persist from an earlier epoch would go on with the sampler they know
        source._iterator = None
        begin_iteration = watched(
            source, begin_iteration, made.read_by, state.get("seen"), made.batch * made.per_batch
        )
        if start["reused"]:
            iterator = opened(
                source, begin_iteration, made.order, replay, lambda: _put_start(source, start)
            )
        else:
            _put_start(source, start)
            iterator = opened(source, begin_iteration, made.order, replay)
    else:
        _put_start(source, start)
        iterator = begin_iteration()
        replay.skip(iterator, made.order)
        iterator = _Streamed(iterator, source, made)
    if (ahead := state.get("ahead")) is None:
        last()
        return iterator
    put_random_states(ahead)
    return _ReadAhead(iterator, made, last)


def forget_workers(source: Any) -> None:
    """New workers read the next pass: those that persist have gone on from what was restored."""
    if is_reused(source) and isinstance(source, DataLoader) and not is_begun_before(source):
        source._iterator = None


def state_between(loader: Any, source: Any, samplers: SamplerStates) -> dict[str, Any]:
    """What the next epoch's order is drawn from, besides the process's random states."""
    before = is_begun_before(source)
    workers = of(source._iterator) if is_reused(source) else None
    return {
        "seen": None if workers is None else workers.state_dict(),
        "reused": is_reused(source) or before,
        "drawn": drawn_before(source) if before else generators_of({"loader": source}).states(),
        "iteration": getattr(loader, "iteration", None),
        "samplers": samplers.state_dict(),
    }


class _Streamed:
    """A stream's batches, each digested as it is read."""

    def __init__(self, iterator: Iterator[Any], source: Any, made: Pass) -> None:
        self._iterator = iterator
        self._made = made
        self._in_process = not workers_of(source)
        self._read = made.batch * made.per_batch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        made = self._made
        if made.draws:
            return next(self._iterator)  # its order cannot be replayed, and so not compared
        self._read += 1
        often = 1 < self._read <= _LOOKED_AT or self._read % _LOOKED_EVERY == 0
        look = often and self._in_process
        before = random_states_here() if look else None
        batch = next(self._iterator)
        if before is not None and not same_random_states(before, random_states_here()):
            made.draws = True
        assert made.order is not None
        made.order.draw(batch)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class AheadOfHandingOut:
    """Keeps the random states from before each batch is read, for whoever reads ahead."""

    def __init__(self, iterator: Iterator[Any], made: Pass) -> None:
        self._iterator = iterator
        self._made = made
        self._read = made.batch * made.per_batch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        made = self._made
        if self._read % made.per_batch == 0:
            made.ahead.append((self._read, random_states_here()))
        batch = next(self._iterator)
        self._read += 1
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class _ReadAhead:
    """An iterator whose first batches had been read, but not handed out."""

    def __init__(self, iterator: Iterator[Any], made: Pass, put_last: Callable[[], None]) -> None:
        self._iterator = iterator
        self._left = made.per_batch
        self._put_last: Callable[[], None] | None = put_last

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._put_last is None:
            return next(self._iterator)
        try:
            batch = next(self._iterator)
            self._left -= 1
        except StopIteration:
            self._left = 0
            raise
        finally:
            if not self._left:
                put_last, self._put_last = self._put_last, None
                put_last()
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def _start_of(source: Any, reused: bool, samplers: SamplerStates) -> dict[str, Any]:
    """What an epoch's order is drawn from."""
    return {
        "reused": reused,
        "random": gather_random_states(),
        "drawn": generators_of({"loader": source}).states(),
        "sampler_epochs": [s.epoch for s in samplers_by_epoch(source)],
        "samplers": samplers.state_dict(),
        "dataset_epochs": [d.epoch for d in datasets_by_epoch(source)],
    }


def _put_start(source: Any, start: dict[str, Any]) -> None:
    put_random_states(start["random"])
    _put_generators(source, start)
    put_sampler_epochs(source, start)
    epochs = start.get("dataset_epochs", [])
    for dataset, epoch in zip(datasets_by_epoch(source), epochs, strict=False):
        dataset.set_epoch(epoch)


def put_sampler_epochs(loader: Any, start: dict[str, Any]) -> None:
    """Tells a loader's samplers, or copies of them, the epochs that a pass began with."""
    epochs = start.get("sampler_epochs")
    if epochs is None:  # of a version that knew but the outermost
        epochs = [e for e in [start["sampler_epoch"]] if e is not None]
    for sampler, epoch in zip(samplers_by_epoch(loader), epochs, strict=False):
        sampler.set_epoch(epoch)


def _put_generators(source: Any, state: dict[str, Any]) -> None:
    generators_of({"loader": source}).put(state.get("drawn", {}))
    # of a version that knew but these
    for generator, old in zip(generators_given(source), state.get("generators", []), strict=False):
        generator.set_state(old)


def random_states_here() -> dict[str, Any]:
    """The random states that reading data in this process may draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }


def same_random_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    mine, theirs = a["numpy"]["state"], b["numpy"]["state"]
    return (
        a["python"] == b["python"]
        and torch.equal(a["torch"], b["torch"])
        and mine.keys() == theirs.keys()
        and all(np.array_equal(mine[key], theirs[key]) for key in mine)
    )
