"""Whether a loader's workers draw, and workers that draw what those before a kill would have drawn.

The random states of workers are in no checkpoint. Each begins from the loader's seed and its own
number; as long as none has drawn, that is where they still are, and new ones are put there: the
worker that reads a batch gets the number of the one that would have read it.

What else they keep is in no checkpoint either: plain attributes of a dataset that change in its
copies, such as a count of what was read, are seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from actckpt.resuming.generators import generators_of
from actckpt.resuming.loaders import is_indexed, is_reused, workers_of
from actckpt.resuming.seeded_samples import layers_of

Begin = Callable[[], Iterator[Any]]

# what a worker's byte says
_DREW, _CHANGED = 1, 2
_PLAIN = (int, float, bool, str)


class WorkerDraws:
    """The workers of one iterator, here and, as a copy, in each of them.

    Args:
        loader: an indexed one, with workers.
        seen: what `state_dict` said of those in whose place they are; None: of nobody.
        read: batches of the pass that are left out; 0 where they begin a whole one.
    """

    def __init__(self, loader: Any, seen: dict[str, Any] | None = None, read: int = 0) -> None:
        self._init = loader.worker_init_fn
        self._collate = loader.collate_fn
        # None is the one that the loader draws for them
        self._seed: int | None = None
        # batch b of the pass is read by the worker of number (b + offset), modulo their count
        self._offset = -read
        if seen is not None:
            self._seed = seen["seed"]
            # a whole pass comes after the one that was seen; they may have been turned in it
            self._offset = seen.get("offset" if read else "offset_after", 0)
        # they take turns beginning with the first in every pass
        self._shift = self._offset + read
        # a byte of each worker, which it sets: one of those above
        self._marks = torch.zeros(loader.num_workers, dtype=torch.uint8).share_memory_()
        self._number = 0
        self._batches = 0
        self._before: tuple[Any, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The seed and turns of the workers, whether one has drawn or changed; between batches."""
        count = len(self._marks)
        return {
            "seed": self._seed,
            "drew": bool((self._marks == _DREW).any()),
            "changed": bool((self._marks == _CHANGED).any()),
            "offset": self._offset % count,
            "offset_after": self._shift % count,
        }

    def go_on(self) -> None:
        """They persist, and read another pass."""
        self._offset = self._shift

    def learn(self, iterator: Any) -> bool:
        """Whether it is these workers that an iterator has begun."""
        if not isinstance(iterator, _MultiProcessingDataLoaderIter) or self is not of(iterator):
            return False
        if self._seed is None:
            self._seed = int(iterator._base_seed)
        return True

    # ---- in a worker

    def begin(self, worker_id: int) -> None:
        """In the place of ``worker_init_fn``."""
        self._number = worker_id
        info = torch.utils.data.get_worker_info()
        assert info is not None
        if self._seed is not None:
            worker_id = _become((worker_id + self._shift) % info.num_workers, self._seed)
        if self._init is not None:
            self._init(worker_id)
        self._dataset = info.dataset
        self._before = _random_states()
        self._keepers = [
            *layers_of(info.dataset),
            getattr(self._collate, "__self__", self._collate),
        ]
        self._kept = self._plain()

    def collate(self, samples: Any) -> Any:
        """In the place of ``collate_fn``."""
        batch = self._collate(samples)
        if not self._marks[self._number]:
            if self._has_drawn():
                self._marks[self._number] = _DREW
            elif self._plain() != self._kept:
                self._marks[self._number] = _CHANGED
        return batch

    def _plain(self) -> list[dict[str, Any]]:
        """The plain attributes of what has copies in workers."""
        held = (getattr(keeper, "__dict__", {}) for keeper in self._keepers)
        return [{name: x for name, x in of.items() if type(x) in _PLAIN} for of in held]

    def _has_drawn(self) -> bool:
        """Whether it has; generators of its own have, wherever there are any."""
        if _random_states() != self._before:
            return True
        self._batches += 1
        # some are made late; a list of a thousand samples is looked through at the 1st, 2nd, 4th,
        # 8th batch
        nearest = bool(self._batches & (self._batches - 1))
        roots = {"dataset": self._dataset, "collate_fn": self._collate, "init_fn": self._init}
        found = generators_of(roots, nearest=nearest)
        return bool(found.by_path or found.unsaved)


def of(iterator: Any) -> WorkerDraws | None:
    """The workers of an iterator that are watched."""
    collate = getattr(iterator, "_collate_fn", None)
    owner = getattr(collate, "__self__", None)
    return owner if isinstance(owner, WorkerDraws) else None


def watched(
    loader: Any,
    begin_iteration: Begin,
    take: Callable[[WorkerDraws], None],
    seen: dict[str, Any] | None = None,
    read: int = 0,
) -> Begin:
    """Begins an iteration whose workers are watched, where there are some.

    Args:
        take: given the workers, where they are watched.
        seen: of workers in whose place those are that begin.
        read: as for `WorkerDraws`.
    """
    if not (is_indexed(loader) and workers_of(loader) and _is_plain(loader)):
        return begin_iteration

    def begin() -> Iterator[Any]:
        if is_reused(loader):
            iterator = begin_iteration()
            workers = of(iterator)
            if workers is not None:
                workers.go_on()
        else:
            workers = WorkerDraws(loader, seen, read)
            given = {"worker_init_fn": workers.begin, "collate_fn": workers.collate}
            own = {name: loader.__dict__[name] for name in given}
            loader.__dict__.update(given)
            try:
                iterator = begin_iteration()
            finally:
                loader.__dict__.update(own)
        if workers is not None and workers.learn(iterator):
            take(workers)
        return iterator

    return begin


def _is_plain(loader: Any) -> bool:
    """Whether its iteration is torch's own, whose workers take turns."""
    return type(loader)._get_iterator is DataLoader._get_iterator and loader.in_order


def _become(number: int, seed: int) -> int:
    """This worker is seeded as the one of another number, as torch does."""
    mine = seed + number
    random.seed(mine)
    torch.manual_seed(mine)
    np.random.seed(torch_worker._generate_state(seed, number))
    info = torch_worker._worker_info
    assert info is not None
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=number, num_workers=info.num_workers, seed=mine, dataset=info.dataset
    )
    return number


def _random_states() -> tuple[Any, ...]:
    """Of the generators that everybody draws from, to be compared."""
    kind, keys, *place = np.random.get_state()
    return (
        random.getstate(),
        (kind, np.asarray(keys).tobytes(), *place),
        torch.get_rng_state().numpy().tobytes(),
    )
