"""Loaders with workers: resumed to the last bit where none has drawn, and said where one has."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import actckpt
from actckpt.resuming import worker_draws

SIZE, WORKERS = 28, 2
# with which `Half` is the first one, and then the second
SEED = 1


class Draws(Dataset[Any]):
    """Reads an index, and draws from a sample on.

    Args:
        first: that draws, by every generator there is.
        own: a sample from which on each worker makes a generator.
    """

    def __init__(self, first: int = SIZE, *, own: int = SIZE) -> None:
        self.first = first
        self.own = own
        self.rng: np.random.Generator | None = None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> list[float]:
        info = get_worker_info()
        if index >= self.own and info is not None and self.rng is None:
            self.rng = np.random.default_rng(info.seed)
        if index < self.first:
            return [float(index)]
        drawn = [torch.rand(()).item(), random.random(), float(np.random.rand())]
        return [float(index), *drawn, float("nan" if info is None else info.id)]


class Counts(Draws):
    """Keeps a count of what was read, in each worker."""

    calls = 0

    def __getitem__(self, index: int) -> list[float]:
        self.calls += 1
        return [*super().__getitem__(index), float(self.calls)]


class Numbers(Draws):
    """Tells by which worker a sample was read."""

    def __getitem__(self, index: int) -> list[float]:
        info = get_worker_info()
        assert info is not None
        return [float(index), float(info.id), float(info.seed)]


class Opened(IterableDataset[Any]):
    """Draws as it is read."""

    def __iter__(self) -> Iterator[Any]:
        return (torch.rand(2).tolist() for _ in range(SIZE // 2))


class Half:
    """Of the data, shuffled; which half is drawn."""

    def __len__(self) -> int:
        return SIZE // 2

    def __iter__(self) -> Iterator[int]:
        at = len(self) if torch.rand(()) > 0.5 else 0
        return iter((torch.randperm(len(self)) + at).tolist())


def as_it_is(samples: list[Any]) -> list[Any]:
    return samples


def seed_once_more(worker_id: int) -> None:
    random.seed(torch.initial_seed() + worker_id)


@contextmanager
def without_collector() -> Iterator[None]:
    """Meanwhile a cycle of references stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def loader(data: Dataset[Any], **settings: Any) -> Any:
    given = {"num_workers": WORKERS, "prefetch_factor": 1, "collate_fn": as_it_is}
    return DataLoader(data, 2, **{**given, **settings})


def read(
    folder: Path, data: Dataset[Any], steps: int, *, seed: int = 0, **settings: Any
) -> tuple[list[Any], Any]:
    """Batches up to a step of the whole run, and what resuming has found."""
    torch.manual_seed(seed)
    found = []
    with actckpt.Checkpointer(
        folder, model=nn.Linear(1, 1), loader=loader(data, **settings), every=1
    ) as run:
        resumed = run.resume()
        for _, batch in run.steps(total_steps=steps):
            found.append(batch)
            run.step()
    return found, resumed


# the data and its loader's settings, and the step after which a run goes on
EXACT: dict[str, tuple[Callable[[], Draws], dict[str, Any], int]] = {
    "none draws": (Draws, {"shuffle": True}, 3),
    "later ones draw": (lambda: Draws(18), {}, 3),
    "later ones, seeded anew": (lambda: Draws(18), {"worker_init_fn": seed_once_more}, 5),
    "they persist": (lambda: Draws(18), {"persistent_workers": True}, 2),
    "they persist, and none has drawn": (Draws, {"persistent_workers": True, "shuffle": True}, 14),
}


@pytest.mark.kind("workers that have not drawn", resumed="exact")
@pytest.mark.parametrize("name", EXACT)
def test_what_is_read_after_a_resume_is_the_same(name: str, tmp_path: Path) -> None:
    make, settings, at = EXACT[name]
    whole, _ = read(tmp_path / "whole", make(), SIZE, **settings)
    assert len(whole) == SIZE
    first, _ = read(tmp_path / "run", make(), at, **settings)
    for until in (at + 2, SIZE):  # resumed, and resumed again
        rest, resumed = read(tmp_path / "run", make(), until, seed=9, **settings)
        first += rest
        assert resumed.bit_exact, resumed.inexact
    assert first == whole


# the data, its loader's settings, the step, and what is said
NOT: dict[str, tuple[Callable[[], Draws], dict[str, Any], int, str]] = {
    "they have drawn": (lambda: Draws(0), {}, 2, "which had drawn, were not saved"),
    "a generator of their own": (lambda: Draws(own=0), {}, 4, "which had drawn"),
    # by the first sample of the 9th batch, the 5th of the first worker
    "a generator that is made late": (lambda: Draws(own=16), {}, 10, "which had drawn"),
    "a worker's number": (Draws, {"num_workers": 1}, 3, "had 1 workers, has 2"),
    "they persist": (lambda: Draws(18), {"persistent_workers": True}, 3, "2 loader workers were"),
    "as they come": (Draws, {"in_order": False}, 4, "as they come"),
}


@pytest.mark.kind("workers that have drawn", resumed="said no")
@pytest.mark.parametrize("name", NOT)
def test_where_that_is_not_known_the_answer_is_no(name: str, tmp_path: Path) -> None:
    make, settings, at, reason = NOT[name]
    read(tmp_path, make(), at, **settings)
    again = {**settings, "num_workers": WORKERS}
    with actckpt.Checkpointer(
        tmp_path, model=nn.Linear(1, 1), loader=loader(make(), **again)
    ) as run:
        resumed = run.resume()
    assert resumed is not None
    (found,) = resumed.inexact
    assert reason in found
    assert "SeededSamples" in found or "as they come" in found


def test_what_workers_keep_is_not_known(tmp_path: Path) -> None:
    read(tmp_path, Counts(), 3)
    _, resumed = read(tmp_path, Counts(), 4)
    (found,) = resumed.inexact
    assert "keeps in 2 loader workers" in found


@pytest.mark.parametrize("at", [3, SIZE // 2])
@pytest.mark.parametrize("before", [False, True])
def test_workers_that_persist_no_more_or_only_now(at: int, before: bool, tmp_path: Path) -> None:
    read(tmp_path, Draws(), at, persistent_workers=before)
    _, resumed = read(tmp_path, Draws(), at + 1, persistent_workers=not before)
    assert f"pass persistent_workers={before}" in resumed.inexact[0]


# steps after which a run is resumed that was resumed before in the middle of an epoch, after an odd
# number of batches: whose workers, since the next epoch, have other numbers than at first
TURNED = {4: False, 5: True, SIZE // 2: False, SIZE // 2 + 2: True}


@pytest.mark.parametrize("at", TURNED)
def test_workers_that_were_turned_are_put_where_they_were(at: int, tmp_path: Path) -> None:
    found = []
    for name, stops in (("whole", [3, SIZE]), ("run", [3, at, SIZE])):
        runs = [read(tmp_path / name, Numbers(), n, persistent_workers=True) for n in stops]
        found.append([batch for batches, _ in runs for batch in batches])
    resumed = runs[-1][1]
    assert resumed.bit_exact == TURNED[at], resumed.inexact
    assert (found[0] == found[1]) == TURNED[at]


# the data, settings of the loader's, epochs before a save by hand, and the step that is restored
LIVE: dict[str, tuple[Callable[[], Dataset[Any]], dict[str, Any], int, int]] = {
    "the beginning": (Draws, {"shuffle": True}, 0, 0),
    "an epoch's end": (lambda: Draws(SIZE // 2), {"sampler": Half()}, 1, SIZE // 4),
    "the beginning of a stream": (Opened, {}, 0, 0),
    "in a stream": (Opened, {}, 0, 3),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_run_that_is_put_back_leaves_its_workers(name: str, tmp_path: Path) -> None:
    make, settings, epochs, at = LIVE[name]
    torch.manual_seed(SEED)
    made = loader(make(), persistent_workers=True, **settings)
    with actckpt.Checkpointer(tmp_path, model=nn.Linear(1, 1), loader=made, every=3) as run:

        def batches(epochs: int | None = None, until: int | None = None) -> list[Any]:
            found = []
            for _, batch in run.steps(epochs=epochs, total_steps=until):
                found.append(batch)
                run.step()
            return found

        run.resume()
        once = batches(epochs) if epochs else []
        run.save()
        once += batches(until=at + 4)
        restored = run.restore(at)
        again = batches(until=at + 4)
    assert restored.bit_exact, restored.inexact
    assert again == once[at:]
    if epochs:  # none has drawn before, and then they do
        assert [len(batch[0]) for batch in once] == [1] * at + [5] * 4


def test_an_iteration_of_the_loaders_own_kind_is_not_known(tmp_path: Path) -> None:
    class Halves(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch[:1]

    data = Draws()

    def resumed() -> Any:
        made = Halves(data, 2, num_workers=1, collate_fn=as_it_is)
        with actckpt.Checkpointer(tmp_path, model=nn.Linear(1, 1), loader=made, every=1) as run:
            found = run.resume()
            next(iter(run.steps()))
            run.step()
        return found

    assert resumed() is None
    assert not resumed().bit_exact


def test_workers_that_persist_end_with_their_loader(tmp_path: Path) -> None:
    read(tmp_path, Draws(), SIZE // 2, persistent_workers=True)
    made = loader(Draws(), persistent_workers=True)
    run = actckpt.Checkpointer(tmp_path, model=nn.Linear(1, 1), loader=made)
    run.resume()
    for _ in run.steps(epochs=2):
        run.step()
    workers = list(made._iterator._workers)
    assert all(worker.is_alive() for worker in workers)
    run.close()
    with without_collector():
        del made, run
        assert not any(worker.is_alive() for worker in workers)


def test_workers_that_keep_their_numbers_read_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, settings, at = EXACT["later ones draw"]
    whole, _ = read(tmp_path / "whole", make(), SIZE // 2, **settings)
    read(tmp_path / "run", make(), at, **settings)
    monkeypatch.setattr(worker_draws, "_become", lambda number, seed: number)
    rest, _ = read(tmp_path / "run", make(), SIZE // 2, **settings)
    assert rest != whole[at:]
