"""The exact position in the data: the same batches, drawn the same, after any number of them."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

import actckpt

# torchdata calls what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SIZE = 20
STEPS = 13


class Noisy(Dataset[torch.Tensor]):
    """Items of which a part is drawn when they are read."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([index, *noise], dtype=torch.float64)


class Stream(IterableDataset[torch.Tensor]):
    """The same without an index."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor([n, random.random()], dtype=torch.float64) for n in range(SIZE))


class Plain(Dataset[torch.Tensor]):
    """Items that are what they are."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _shared() -> Any:
    generator = seeded(3)
    sampler = RandomSampler(Plain(), generator=generator)
    return DataLoader(Noisy(), 4, sampler=sampler, generator=generator)


def _distributed() -> Any:
    return DistributedSampler(Plain(), num_replicas=2, rank=1, seed=5)


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "ragged": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "drop_last": lambda: DataLoader(Noisy(), 3, shuffle=True, drop_last=True),
    "single": lambda: DataLoader(Noisy(), None, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=seeded(3)),
    "shared generator": _shared,
    "replacement": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(Noisy(), replacement=True, num_samples=SIZE)
    ),
    "weighted": lambda: DataLoader(
        Noisy(), 4, sampler=WeightedRandomSampler([1.0, 2.0] * (SIZE // 2), SIZE)
    ),
    "subset": lambda: DataLoader(Noisy(), 4, sampler=SubsetRandomSampler(range(SIZE))),
    "distributed": lambda: DataLoader(Noisy(), 2, sampler=_distributed()),
    "distributed, batch by batch": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(_distributed(), 2, drop_last=False)
    ),
    "two workers": lambda: DataLoader(Plain(), 4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(
        Plain(), 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "stream": lambda: DataLoader(Stream(), 4),
    "list": lambda: [torch.tensor([float(n)]) for n in range(5)],
    "stateful": lambda: StatefulDataLoader(Plain(), 4, shuffle=True),
    "stateful, two workers": lambda: StatefulDataLoader(Plain(), 4, shuffle=True, num_workers=2),
}


def start(directory: Path, loader: Any, seed: int) -> actckpt.Checkpointer:
    """A run of hardly anything but a loader."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    run = actckpt.Checkpointer(directory, model=nn.Linear(1, 1), loader=loader, keep_last=None)
    run.resume()
    return run


def read(run: actckpt.Checkpointer, until: int, *, save: bool = False) -> list[Any]:
    """The batches up to a step, with draws between them as dropout makes; saves after each."""
    found = []
    for step, batch in run.steps(epochs=None, total_steps=until):
        found.append((step, run.epoch, batch.tolist(), torch.rand(()).item(), random.random()))
        run.step()
        if save:
            run.save()
        if run.step_count == until:
            break
    run.close()
    return found


@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_after_any_step_the_rest_is_the_same(kind: str, tmp_path: Path) -> None:
    make = LOADERS[kind]
    whole = read(start(tmp_path, make(), 1), STEPS, save=True)
    assert len(whole) == STEPS
    assert len({str(batch) for _, _, batch, *_ in whole}) > 3
    # in the middle, one before the end, at the end of an epoch, and after it
    steps = (2, 6) if "persistent" in kind else (1, 2, 4, 5, 6, 7, 10, 11)
    for step in steps:
        other = start(tmp_path / "other", make(), 99)
        other.close()
        run = actckpt.Checkpointer(tmp_path, model=nn.Linear(1, 1), loader=make(), keep_last=None)
        run.restore(step)
        assert read(run, STEPS) == whole[step:], step


@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_between_two_epochs(kind: str, tmp_path: Path) -> None:
    def epochs(run: actckpt.Checkpointer, count: int) -> list[Any]:
        return [(batch.tolist(), torch.rand(()).item()) for _, batch in run.steps(epochs=count)]

    run = start(tmp_path, LOADERS[kind](), 1)
    epochs(run, 2)
    run.save()
    expected = epochs(run, 4)
    run.close()
    run = start(tmp_path, LOADERS[kind](), 2)
    assert epochs(run, 4) == expected
    run.close()


def pairs(run: actckpt.Checkpointer, until: int) -> list[Any]:
    """The batches up to a step, by a loop that `steps` ends."""
    found = []
    for step, batch in run.steps(epochs=None, total_steps=until):
        found.append((step, torch.as_tensor(batch).tolist(), torch.rand(()).item()))
        run.step()
    return found


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("end", [3, 5, 10])
def test_a_run_that_has_ended_can_be_made_longer(kind: str, end: int, tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(7)  # some loaders draw when they are made
        return LOADERS[kind]()

    whole = pairs(start(tmp_path / "whole", made(), 1), STEPS)
    run = start(tmp_path / "parts", made(), 1)
    first = pairs(run, end)
    run.save()
    run.close()
    again = start(tmp_path / "parts", LOADERS[kind](), 2)
    assert first + pairs(again, STEPS) == whole
    again.close()


@pytest.mark.parametrize("kind", LOADERS)
def test_restored_in_the_loop_the_data_is_read_from_there(kind: str, tmp_path: Path) -> None:
    run = start(tmp_path, LOADERS[kind](), 1)
    found, restored = [], False
    for step, batch in run.steps(epochs=None, total_steps=STEPS):
        found.append((step, batch.tolist(), torch.rand(()).item()))
        run.step()
        if run.step_count in (3, 6):
            run.save()
        if run.step_count == 8 and not restored:
            restored = True
            run.restore(3)
    assert found[8:13] == found[3:8]
    assert [step for step, *_ in found] == [*range(8), *range(3, STEPS)]
    run.close()
    other = start(tmp_path, LOADERS[kind](), 2)
    other.restore(6)  # the newer of the two, which was saved after it
    assert pairs(other, STEPS) == found[11:]
    other.close()


def test_another_order_of_as_many_batches_is_refused(tmp_path: Path) -> None:
    def saved(name: str, loader: Any) -> None:
        read(start(tmp_path / name, loader, 1), 2, save=True)

    saved("data", DataLoader(Plain(), 4, shuffle=True))
    for message, loader in {
        "sampler RandomSampler, this loader has SequentialSampler": DataLoader(Plain(), 4),
        "samples 20, this loader has 19": DataLoader(
            torch.utils.data.Subset(Plain(), range(19)), 4, shuffle=True
        ),
        "drop_last False, this loader has True": DataLoader(
            Plain(), 4, shuffle=True, drop_last=True
        ),
    }.items():
        with pytest.raises(actckpt.CheckpointMismatchError, match=message):
            start(tmp_path / "data", loader, 1)


def test_workers_that_bring_batches_as_they_come_are_not_exact(tmp_path: Path) -> None:
    def loader(**how: Any) -> Any:
        return DataLoader(actckpt.SeededSamples(Plain(), 1), 4, shuffle=True, num_workers=2, **how)

    loaders = {
        "": loader(),
        "as they come": loader(in_order=False),
    }
    for n, (reason, made) in enumerate(loaders.items()):
        run = start(tmp_path / str(n), made, 1)
        next(iter(run.steps()))
        run.step()
        run.save()
        found = run.restore().inexact
        assert reason in "".join(found), found
        assert len(found) == bool(reason)
        run.close()


@pytest.mark.parametrize("saved", [3, 7, 10])
def test_workers_end_with_their_loader(saved: int, tmp_path: Path) -> None:
    run = start(tmp_path, LOADERS["persistent"](), 1)
    pairs(run, saved)
    run.save()
    run.close()
    loader = LOADERS["persistent"]()
    run = start(tmp_path, loader, 2)
    pairs(run, STEPS)
    workers = list(loader._iterator._workers)
    gone = weakref.ref(loader)
    run.close()
    gc.collect()
    gc.disable()
    try:
        # to the garbage collector it would be left in no good order: 10 s until it gives up
        del run, loader
        assert gone() is None
    finally:
        gc.enable()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("loader", [[], DataLoader(Plain(), 64, drop_last=True), iter([1, 2])])
def test_a_loader_that_gives_nothing_is_an_error(loader: Any, tmp_path: Path) -> None:
    run = start(tmp_path, loader, 1)
    with pytest.raises(ValueError, match="gave no batch in epoch"):
        pairs(run, 5)
    run.close()


def test_items_that_were_trained_on_are_not_read_again(tmp_path: Path) -> None:
    class Counted(Plain):
        def __getitem__(self, index: int) -> torch.Tensor:
            reads.append(index)
            return super().__getitem__(index)

    reads: list[int] = []
    read(start(tmp_path, DataLoader(Counted(), 4, shuffle=True), 1), 3, save=True)
    first = list(reads)
    reads.clear()
    read(start(tmp_path, DataLoader(Counted(), 4, shuffle=True), 2), 5)
    assert len(first) == 12
    assert sorted(first + reads) == list(range(SIZE))


def test_a_loader_without_length_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    class Ones(IterableDataset[torch.Tensor]):
        def __init__(self, count: int) -> None:
            self.count = count

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter([torch.ones(1)] * self.count)

    read(start(tmp_path, DataLoader(Ones(5), None), 1), 4, save=True)
    run = start(tmp_path, DataLoader(Ones(2), None), 1)
    with pytest.raises(
        actckpt.CheckpointMismatchError, match=r"4 batches into the epoch; .* only 2"
    ):
        read(run, 5)
    run.close()


def test_epochs_of_a_run_are_counted_across_processes(tmp_path: Path) -> None:
    def make() -> Any:
        return [torch.ones(1)] * 3

    run = start(tmp_path, make(), 1)
    for _ in run.steps(epochs=2):
        run.step()
        if run.step_count == 4:
            run.save()
    assert (run.step_count, run.epoch) == (6, 2)
    run.close()
    run = start(tmp_path, make(), 1)
    assert [step for step, _ in run.steps(epochs=2)] == [4, 4]
    assert run.epoch == 2
    run.close()


@pytest.mark.parametrize("kind", ["distributed", "distributed, batch by batch"])
def test_a_sampler_is_told_the_epoch(kind: str, tmp_path: Path) -> None:
    def epochs(run: actckpt.Checkpointer, until: int) -> list[list[float]]:
        rows = [(run.epoch, batch[:, 0].tolist()) for _, batch in run.steps(epochs=until)]
        return [[x for e, row in rows if e == n for x in row] for n in dict(rows)]

    sampler = _distributed()
    expected = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        expected.append([float(n) for n in sampler])
    assert len({str(order) for order in expected}) == 4
    run = start(tmp_path, LOADERS[kind](), 1)
    assert epochs(run, 2) == expected[:2]
    run.save()
    run.close()
    run = start(tmp_path, LOADERS[kind](), 2)
    assert epochs(run, 4) == expected[2:]
    run.close()


def test_a_sampler_that_is_told_by_the_user_is_left_alone(tmp_path: Path) -> None:
    loader = LOADERS["distributed"]()
    run = start(tmp_path, loader, 1)
    for epoch in (7, 8, 8):
        loader.sampler.set_epoch(epoch)
        expected = [float(n) for n in loader.sampler]
        read = [x for _, batch in run.steps(epochs=run.epoch + 1) for x in batch[:, 0].tolist()]
        assert read == expected
        assert loader.sampler.epoch == epoch
    run.close()


def test_a_loop_left_early_begins_another_pass(tmp_path: Path) -> None:
    run = start(tmp_path, [torch.tensor([float(n)]) for n in range(3)], 1)
    first = next(iter(run.steps(epochs=None)))
    again = next(iter(run.steps(epochs=None)))
    assert first[1] == again[1]
    assert run.epoch == 1
    run.close()
