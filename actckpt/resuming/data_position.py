"""Where a run is in its data, and how a loader is brought back to that place.

A plain DataLoader's order is drawn when an epoch begins. So the random states of that moment are
kept; a resumed run draws the same order again from them, and skips what was already trained on
without loading it. A loader that has a ``state_dict`` of its own is asked for it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.random_states import gather_random_states, put_random_states

Loader = Iterable[Any]


class DataPosition:
    """Epoch, and batches handed out in it."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batch = 0
        self._start: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None

    def state_dict(self, loader: Loader | None) -> dict[str, Any]:
        """The position as a state, between two batches."""
        if self._pending is not None:
            return self._pending  # nothing was read since it was restored
        batches = _length(loader)
        state: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "batches": batches}
        if self.batch and (own := _stateful(loader)) is not None:
            state["loader"] = own.state_dict()
        elif self.batch:
            state["start"] = self._start
        return state

    def check(self, state: dict[str, Any] | None, loader: Loader | None, where: str) -> None:
        """Raises unless ``loader`` can be brought to a saved position.

        Args:
            state: None is the position that was restored and not taken up yet.

        Raises:
            CheckpointMismatchError: it has another number of batches, or is of another kind.
        """
        state = self._pending if state is None else state
        if loader is None or state is None:
            return
        here, there = _length(loader), state["batches"]
        if there is not None and here != there:
            raise CheckpointMismatchError(
                f"{where} was saved with a loader of {there} batches an epoch, this one has "
                f"{here}: its order cannot be replayed. Pass the same data, batch size and "
                "drop_last. Nothing was changed"
            )
        if state["batch"] and ("loader" in state) != (_stateful(loader) is not None):
            raise CheckpointMismatchError(
                f"{where} was saved with a loader that had {'a' if 'loader' in state else 'no'} "
                "state_dict of its own, unlike this one. Nothing was changed"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a saved position; the loader is moved there when it is next read."""
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._start = state.get("start")
        self._pending = state if self.batch else None

    def rest_of_epoch(self, loader: Loader, put_last: Callable[[], None]) -> Iterator[Any]:
        """The batches of the epoch that were not handed out yet.

        Args:
            put_last: restores the random states, once nothing of the loader's draws any more.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            iterator = self._reopened(loader, pending)
        else:
            if self.batch:  # a loop that was left early; this is another pass
                self.epoch, self.batch = self.epoch + 1, 0
            put_last()
            if _stateful(loader) is None:
                self._start = _start_of(loader)
            iterator = iter(loader)
        if pending is not None:
            put_last()
        for batch in iterator:
            self.batch += 1
            yield batch
        self.epoch, self.batch, self._start = self.epoch + 1, 0, None

    def _reopened(self, loader: Loader, state: dict[str, Any]) -> Iterator[Any]:
        if (own := _stateful(loader)) is not None:
            own.load_state_dict(state["loader"])
            return iter(loader)
        _put_start(loader, state["start"])
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            return _skipped(loader, self.batch)
        iterator = iter(loader)
        for done in range(self.batch):
            if next(iterator, _END) is _END:
                raise _too_short(self.batch, done)
        return iterator


_END = object()


class _SkipFirst:
    """A sampler whose first pass leaves out what it begins with."""

    def __init__(self, sampler: Iterable[Any], count: int) -> None:
        self._sampler = sampler
        self._count = count
        self._iterator: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if not self._count:
            return iter(self._sampler)
        # only now: the loader draws its seed between this call and the first index
        self._iterator = iter(self._sampler)
        return self

    def __next__(self) -> Any:
        self.skip()
        assert self._iterator is not None
        return next(self._iterator)

    def skip(self) -> None:
        """Leaves out what is to be left out, unless that was done."""
        count, self._count = self._count, 0
        for done in range(count):
            assert self._iterator is not None
            if next(self._iterator, _END) is _END:
                raise _too_short(count, done)


def _skipped(loader: DataLoader[Any], count: int) -> Iterator[Any]:
    """An iterator over a loader that begins at batch ``count``, whose sampler has drawn its order.

    A loader does not let its sampler be replaced, and reads it when iteration begins: so the
    attribute is replaced for that moment.
    """
    # workers that persist from an earlier epoch would go on with the sampler that they know
    loader._iterator = None
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    original = loader.__dict__[name]
    skipping = loader.__dict__[name] = _SkipFirst(original, count)
    try:
        iterator = iter(loader)
    finally:
        loader.__dict__[name] = original
    skipping.skip()
    return iterator


def _start_of(loader: Loader) -> dict[str, Any]:
    """What an epoch's order is drawn from."""
    return {
        "random": gather_random_states(),
        "generators": [g.get_state() for g in _generators(loader)],
        "sampler_epoch": getattr(_sampler(loader), "epoch", None),
    }


def _put_start(loader: Loader, start: dict[str, Any]) -> None:
    put_random_states(start["random"])
    for generator, state in zip(_generators(loader), start["generators"], strict=True):
        generator.set_state(state)
    sampler = _sampler(loader)
    if start["sampler_epoch"] is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(start["sampler_epoch"])


def _sampler(loader: Loader) -> Any:
    return getattr(loader, "sampler", None)


def _generators(loader: Loader) -> list[torch.Generator]:
    """The generators that a loader and its samplers were given, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [loader, _sampler(loader), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _stateful(loader: object) -> Stateful | None:
    return loader if isinstance(loader, Stateful) else None


def _length(loader: Loader | None) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _too_short(wanted: int, found: int) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"the run was {wanted} batches into the epoch; the loader has only {found}. "
        "Pass the same data, batch size and drop_last"
    )
