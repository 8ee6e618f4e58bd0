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
from actckpt.resuming.generators import generators_of
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.random_states import gather_random_states, put_random_states
from actckpt.resuming.seeded_samples import draws_by_seed, tell_epoch

Loader = Iterable[Any]


class DataPosition:
    """Epoch, and batches handed out in it."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batch = 0
        self._start: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._told = 0  # what a sampler was last told; they all begin at 0

    def state_dict(self, loader: Loader | None) -> dict[str, Any]:
        """The position as a state, between two batches."""
        if self._pending is not None:
            return self._pending  # nothing has been read since it was restored
        batches = _length(loader)
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "batch": self.batch,
            "batches": batches,
            "workers": _workers(loader),
            "order": _order(loader),
        }
        if loader is None or not (self.batch or self.epoch):
            return state  # asking a loader that was never read could make it draw
        if (own := _stateful(loader)) is not None:
            state["loader"] = own.state_dict()
        elif self.batch:
            state["start"] = self._start
        else:
            state["between"] = {
                "reused": _reused(loader),
                "generators": [g.get_state() for g in _generators(loader)],
            }
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
        mine, theirs = _order(loader), state["order"]
        changed = [k for k in mine if k in theirs and mine[k] != theirs[k]]
        if state["batch"] and changed:
            first = changed[0]
            raise CheckpointMismatchError(
                f"{where} was saved in the middle of an epoch with {first} {theirs[first]}, this "
                f"loader has {mine[first]}: its order cannot be replayed. Pass the same data, "
                "batch size, drop_last and sampler. Nothing was changed"
            )
        if state["batch"] and ("loader" in state) != (_stateful(loader) is not None):
            raise CheckpointMismatchError(
                f"{where} was saved with a loader that had {'a' if 'loader' in state else 'no'} "
                "state_dict of its own, unlike this one. Nothing was changed"
            )

    def inexact(self, state: dict[str, Any], loader: Loader | None) -> str:
        """Why what is read after a saved position may be another than it would have been; or ""."""
        here, there = _workers(loader), state["workers"]
        # new workers at the beginning of an epoch are seeded from states that were saved
        lasting = state["batch"] > 0 or state.get("between", {}).get("reused", False)
        if None in (here, there):
            return ""
        if reason := _unordered(loader):
            return reason
        if draws_by_seed(loader):
            return ""
        if here != there:
            what = f"the loader had {there} workers, has {here}"
        elif here and lasting:
            what = f"the random states of {here} loader workers were not saved"
        else:
            return ""
        return (
            f"{what}: what the dataset draws there, if anything, differs; wrap it in "
            "actckpt.SeededSamples"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a saved position; the loader is moved there when it is next read."""
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._start = state.get("start")
        self._pending = state

    def rest_of_epoch(self, loader: Loader, put_last: Callable[[], None]) -> Iterator[Any]:
        """The batches of the epoch that were not handed out yet.

        Args:
            put_last: restores the random states, once nothing of the loader's draws any more.
        """
        pending, self._pending = self._pending, None
        if self.batch and pending is None:  # a loop that was left early; this is another pass
            self.epoch, self.batch = self.epoch + 1, 0
        tell_epoch(loader, self.epoch)
        self._tell_sampler(loader)
        if pending is not None and self.batch:
            iterator = self._reopened(loader, pending)
            put_last()
        else:
            iterator = self._begun(loader, pending or {}, put_last)
        for batch in iterator:
            self.batch += 1
            yield batch
            if self._is_restored():
                return  # in the meantime: the next pass begins there
        if pending is None and not self.batch:
            raise ValueError(
                f"the loader gave no batch in epoch {self.epoch} (its length: {_length(loader)}): "
                "it is empty, or can be read only once. Pass one that gives batches every epoch"
            )
        self.epoch, self.batch, self._start = self.epoch + 1, 0, None

    def _tell_sampler(self, loader: Loader) -> None:
        """Sets the epoch of a sampler that has one, unless somebody else has since we did."""
        sampler = _by_epoch(loader)
        if sampler is not None and sampler.epoch == self._told:
            sampler.set_epoch(self.epoch)
            self._told = self.epoch

    def _is_restored(self) -> bool:
        """Whether the position was restored and nothing has been read from there yet."""
        return self._pending is not None

    def _begun(
        self, loader: Loader, pending: dict[str, Any], put_last: Callable[[], None]
    ) -> Iterator[Any]:
        """An iterator over a whole epoch; the first after a resume where something is pending."""
        between = pending.get("between", {"reused": _reused(loader), "generators": []})
        own = _stateful(loader)
        if own is not None and "loader" in pending:
            own.load_state_dict(pending["loader"])
            own.state_dict()  # some only now do what was loaded, and draw for it
        _put_generators(loader, between["generators"])

        def begin() -> None:
            put_last()
            if own is None:
                self._start = _start_of(loader, between["reused"])

        if between["reused"] and not _reused(loader) and _is_indexed(loader):
            return _opened(loader, begin=begin)
        begin()
        return iter(loader)

    def _reopened(self, loader: Loader, state: dict[str, Any]) -> Iterator[Any]:
        if (own := _stateful(loader)) is not None:
            own.load_state_dict(state["loader"])
            return iter(loader)
        start = state["start"]
        if _is_indexed(loader):
            # workers that persist from an earlier epoch would go on with the sampler they know
            loader._iterator = None  # type: ignore[attr-defined]
            if start["reused"]:
                return _opened(loader, self.batch, lambda: _put_start(loader, start))
            _put_start(loader, start)
            return _opened(loader, self.batch)
        _put_start(loader, start)
        iterator = iter(loader)
        for done in range(self.batch):
            if next(iterator, _END) is _END:
                raise _too_short(self.batch, done)
        return iterator


_END = object()


class _SkipFirst:
    """A sampler whose first pass leaves out what it begins with.

    Args:
        begin: called before the sampler is read, and so after the loader has drawn its seed.
    """

    def __init__(
        self, sampler: Iterable[Any], count: int, begin: Callable[[], None] | None
    ) -> None:
        self._sampler = sampler
        self._count = count
        self._begin = begin
        self._iterator: Iterator[Any] | None = None
        self._first = True

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if not self._first:
            return iter(self._sampler)
        if self._begin is None:
            self._iterator = iter(self._sampler)
        return self

    def __next__(self) -> Any:
        return next(self.read())

    def read(self) -> Iterator[Any]:
        """The sampler's iterator, once what is to be left out was."""
        if self._first:
            self._first = False
            if self._begin is not None:
                self._begin()
                # workers that persist keep this, and it would keep their loader: a cycle, which
                # the garbage collector ends by closing their queues first, and waits for 10 s
                self._begin = None
                self._iterator = iter(self._sampler)
            assert self._iterator is not None
            for done in range(self._count):
                if next(self._iterator, _END) is _END:
                    raise _too_short(self._count, done)
        assert self._iterator is not None
        return self._iterator


def _opened(loader: Any, count: int = 0, begin: Callable[[], None] | None = None) -> Iterator[Any]:
    """An iterator over an indexed loader from batch ``count`` on; its sampler has begun.

    A loader does not let its sampler be replaced, and looks for it when iteration begins: so the
    attribute is replaced for that moment.
    """
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    original = loader.__dict__[name]
    skipping = loader.__dict__[name] = _SkipFirst(original, count, begin)
    try:
        iterator: Iterator[Any] = iter(loader)
    finally:
        loader.__dict__[name] = original
    skipping.read()
    return iterator


def _is_indexed(loader: Loader) -> bool:
    """Whether it is a plain DataLoader that reads a dataset by a sampler's indices."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _reused(loader: Loader | None) -> bool:
    """Whether the loader has begun an epoch before, in workers that persist.

    Such a loader draws no new seed for an epoch.
    """
    return getattr(loader, "_iterator", None) is not None


def _start_of(loader: Loader, reused: bool) -> dict[str, Any]:
    """What an epoch's order is drawn from."""
    return {
        "reused": reused,
        "random": gather_random_states(),
        "generators": [g.get_state() for g in _generators(loader)],
        "drawn": generators_of({"loader": loader}).states(),
        "sampler_epoch": getattr(_by_epoch(loader), "epoch", None),
    }


def _put_start(loader: Loader, start: dict[str, Any]) -> None:
    put_random_states(start["random"])
    _put_generators(loader, start["generators"])
    generators_of({"loader": loader}).put(start.get("drawn", {}))
    sampler = _by_epoch(loader)
    if start["sampler_epoch"] is not None and sampler is not None:
        sampler.set_epoch(start["sampler_epoch"])


def _put_generators(loader: Loader, states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators(loader), states, strict=False):
        generator.set_state(state)


def _sampler(loader: object) -> Any:
    return getattr(loader, "sampler", None)


def _samplers(loader: Loader) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [_sampler(loader), batch_sampler, getattr(batch_sampler, "sampler", None)]


def _by_epoch(loader: Loader) -> Any:
    """The sampler whose order depends on an epoch that it is told (DistributedSampler), or None."""
    return next(
        (s for s in _samplers(loader) if hasattr(s, "set_epoch") and hasattr(s, "epoch")), None
    )


def _generators(loader: Loader) -> list[torch.Generator]:
    """The generators that a loader and its samplers were given, each once."""
    found = (getattr(owner, "generator", None) for owner in [loader, *_samplers(loader)])
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _stateful(loader: object) -> Stateful | None:
    return loader if isinstance(loader, Stateful) else None


def _length(loader: object) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _order(loader: Loader | None) -> dict[str, Any]:
    """What the order of a plain loader's samples depends on, besides random states."""
    if not isinstance(loader, DataLoader):
        return {}
    return {
        "samples": _length(loader.dataset),
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "sampler": type(loader.sampler).__qualname__,
        "batch_sampler": type(loader.batch_sampler).__qualname__,
    }


def _unordered(loader: Loader | None) -> str:
    """Why workers may bring the samples in another order than they did; or ""."""
    if not _workers(loader):
        return ""
    if not getattr(loader, "in_order", True):
        return "the loader's workers bring batches as they come (in_order=False)"
    sampler = type(_sampler(loader))
    if sampler.__module__.partition(".")[0] in ("torch", "torchdata", "builtins"):
        return ""
    return (
        f"what {sampler.__qualname__} draws while batches are fetched ahead, if anything, differs"
    )


def _workers(loader: Loader | None) -> int | None:
    """Processes that read the data beside this one; None where no data is read."""
    return None if loader is None else getattr(loader, "num_workers", 0)


def _too_short(wanted: int, found: int) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"the run was {wanted} batches into the epoch; the loader has only {found}. "
        "Pass the same data, batch size and drop_last"
    )
