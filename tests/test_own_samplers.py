"""Samplers of the user's own: their order is drawn again and compared, or the answer is no."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

import actckpt

SIZE = 20
EPOCHS = 3


class Numbers(Dataset[torch.Tensor]):
    """Plain ones."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index))


class Buckets(Sampler[list[int]]):
    """Batches, in an order that a generator draws, which goes on from epoch to epoch."""

    def __init__(self, draws: Any) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return SIZE // 4

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(n, n + 4)) for n in range(0, SIZE, 4)]
        self.draws.shuffle(batches)
        yield from batches


class Counting(Buckets):
    """It can say where it is, and forgets half of that."""

    done = epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        for n, batch in enumerate(batches):
            self.done = n + 1
            yield [(i + self.epoch) % SIZE for i in batch]
        self.done = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Curriculum(Sampler[int]):
    """Begins with what training found difficult."""

    def __init__(self) -> None:
        self.losses = [0.0] * SIZE

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(SIZE), key=lambda i: (-self.losses[i], i)))


class Late(Sampler[int]):
    """Draws each index when it is asked for, from what training draws from, too."""

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(SIZE) for _ in range(SIZE))


class Hidden(Sampler[int]):
    """Draws from what nothing leads to."""

    def __init__(self) -> None:
        iterator = iter(np.random.default_rng(5).permutation(SIZE * 20).tolist())
        self.draw: Any = Opaque(iterator.__next__)

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return (self.draw.take() % SIZE for _ in range(SIZE))


class Opaque:
    """Without attributes."""

    __slots__ = ("take",)

    def __init__(self, take: Any) -> None:
        self.take = take


def batched(sampler: Any) -> Any:
    return DataLoader(Numbers(), batch_sampler=sampler)


LOADERS: dict[str, Callable[[], Any]] = {
    "python": lambda: batched(Buckets(random.Random(0))),
    "numpy": lambda: batched(Buckets(np.random.default_rng(0))),
    "numpy legacy": lambda: batched(Buckets(np.random.RandomState(0))),
    "global": lambda: batched(Buckets(random)),
    "state_dict": lambda: batched(Counting(random.Random(0))),
    "curriculum": lambda: DataLoader(Numbers(), 4, sampler=Curriculum()),
    "workers": lambda: DataLoader(
        actckpt.SeededSamples(Numbers()), batch_sampler=Buckets(random), num_workers=2
    ),
}


def made(directory: Path, loader: Any, seed: int = 1) -> actckpt.Checkpointer:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return actckpt.Checkpointer(
        directory, model=nn.Linear(1, 1), loader=loader, every=None, keep_last=None
    )


def train(run: actckpt.Checkpointer, loader: Any, until: int = -1) -> list[Any]:
    """What a loop reads that draws, and tells a curriculum how difficult it was."""
    found = []
    for _, batch in run.steps(epochs=EPOCHS):
        found.append((batch.tolist(), random.random()))
        if isinstance(loader.sampler, Curriculum):
            for n in batch.tolist():
                loader.sampler.losses[int(n)] = (n * 7 + run.step_count) % 11
        run.step()
        if run.step_count == until:
            break
    return found


@pytest.mark.kind("a sampler of the user's own", bits=True, resumed="exact")
@pytest.mark.parametrize("kind", LOADERS)
def test_its_order_goes_on(kind: str, tmp_path: Path) -> None:
    loader = LOADERS[kind]()
    run = made(tmp_path / "whole", loader)
    whole = train(run, loader)
    run.close()
    assert len(whole) == 15
    for until in (7,) if kind == "workers" else (2, 5, 7, 10):
        loader = LOADERS[kind]()
        run = made(tmp_path / str(until), loader)
        parts = train(run, loader, until)
        run.save()
        run.close()
        loader = LOADERS[kind]()
        run = made(tmp_path / str(until), loader, seed=2)
        resumed = run.resume()
        assert resumed is not None
        assert resumed.bit_exact, resumed.inexact
        assert parts + train(run, loader) == whole
        run.close()


@pytest.mark.kind("a sampler that draws from what nobody can save", resumed="said no")
@pytest.mark.parametrize(
    ("sampler", "reason"),
    [(Late, "Late draws another order than it did"), (Hidden, "Hidden.draw is another")],
)
def test_an_order_that_is_another_is_said_when_resuming(
    sampler: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loader() -> Any:
        return DataLoader(Numbers(), 4, sampler=sampler())

    run = made(tmp_path, loader())
    train(run, loader(), 3)
    run.save()
    run.close()
    run = made(tmp_path, loader(), seed=2)
    resumed = run.resume()
    assert resumed is not None
    assert any(reason in why for why in resumed.inexact), resumed.inexact
    # it was said, and the run goes on all the same
    assert len(train(run, loader())) == 12
    run.close()


def test_a_sampler_that_is_made_otherwise_is_said(tmp_path: Path) -> None:
    class Sorted(Sampler[int]):
        def __init__(self, lengths: list[int]) -> None:
            self.lengths = lengths

        def __len__(self) -> int:
            return SIZE

        def __iter__(self) -> Iterator[int]:
            return iter(sorted(range(SIZE), key=lambda i: self.lengths[i]))

    lengths = [(n * 7) % SIZE for n in range(SIZE)]
    run = made(tmp_path, DataLoader(Numbers(), 4, sampler=Sorted(lengths)))
    next(run.steps())
    run.step()
    run.save()
    run.close()
    run = made(tmp_path, DataLoader(Numbers(), 4, sampler=Sorted(lengths[::-1])))
    resumed = run.resume()
    assert resumed is not None
    assert any("Sorted.lengths is another" in why for why in resumed.inexact)
    run.close()


@pytest.mark.kind("data that changed without changing its length", resumed="said no")
def test_batches_that_are_others_than_they_were_are_refused_once(tmp_path: Path) -> None:
    def loader(first: float) -> Any:
        return [torch.tensor([first + n]) for n in range(5)]

    run = made(tmp_path, loader(0))
    for _ in run.steps():
        run.step()
        if run.step_count == 2:
            break
    run.save()
    run.close()
    run = made(tmp_path, loader(1))
    assert run.resume().bit_exact  # type: ignore[union-attr] # it is known when they are read
    with pytest.raises(actckpt.CheckpointMismatchError, match="the first 2 batches") as raised:
        next(run.steps())
    assert "iterate again" in str(raised.value)
    assert [batch.item() for _, batch in run.steps()] == [3, 4, 5]
    run.close()


def test_a_stream_that_draws_as_it_is_read_is_not_claimed(tmp_path: Path) -> None:
    class Drawn(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return (torch.tensor(random.random()) for _ in range(SIZE))

    run = made(tmp_path, DataLoader(Drawn(), 4))
    train(run, run.loader, 2)
    run.save()
    run.close()
    run = made(tmp_path, DataLoader(Drawn(), 4))
    resumed = run.resume()
    assert resumed is not None
    assert any("while it is read" in why for why in resumed.inexact)
    run.close()
