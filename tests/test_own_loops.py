"""Loops that are not `run.steps`: the place of the loader given is kept, or the answer no."""

from __future__ import annotations

import copy
import itertools
import pickle
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import actckpt

SIZE = 20
EPOCHS = 3


class Numbers(Dataset[torch.Tensor]):
    """Items of which a part is drawn when they are read."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()])


class Stream(IterableDataset[torch.Tensor]):
    """Numbers one after another, a part of them in each worker."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (torch.tensor([float(n)]) for n in range(first, SIZE, step))


def shuffled(**how: Any) -> Any:
    return DataLoader(Numbers(), 4, shuffle=True, **how)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": shuffled,
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(3)),
    "stream": lambda: DataLoader(Stream(), 4),
    "own class": lambda: Iterable(),
}


class Iterable:
    """A loader of the user's own."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.tensor([float(n)]) for n in range(5)])


def made(directory: Path, loader: Any, seed: int = 1) -> tuple[actckpt.Checkpointer, nn.Module]:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = nn.Linear(1, 1)
    run = actckpt.Checkpointer(directory, model=model, loader=loader, every=None, keep_last=None)
    return run, model


def train(
    run: actckpt.Checkpointer, loader: Any, until: int = -1, accumulate: int = 1
) -> list[Any]:
    """A plain loop; what it read, and drew."""
    found: list[Any] = []
    for epoch in range(run.epoch, EPOCHS):
        for count, batch in enumerate(loader, 1):
            found.append((epoch, batch.tolist(), torch.rand(()).item(), random.random()))
            if count % accumulate == 0:
                run.step()
            if run.step_count == until:
                return found
    return found


@pytest.mark.kind("a plain loop over the loader, killed and resumed", bits=True, resumed="exact")
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("until", [1, 4, 5, 7, 10])
def test_a_plain_loop_goes_on_at_its_place(kind: str, until: int, tmp_path: Path) -> None:
    loader = LOADERS[kind]()
    run, _ = made(tmp_path / "whole", loader)
    whole = train(run, loader)
    run.close()
    assert len(whole) == 15
    loader = LOADERS[kind]()
    run, _ = made(tmp_path / "parts", loader)
    parts = train(run, loader, until)
    run.save()
    run.close()
    loader = LOADERS[kind]()
    run, _ = made(tmp_path / "parts", loader, seed=2)
    resumed = run.resume()
    assert resumed is not None
    assert resumed.bit_exact, resumed.inexact
    parts += train(run, loader)
    run.close()
    assert parts == whole


def test_watching_changes_nothing_that_is_read(tmp_path: Path) -> None:
    def read(loader: Any) -> list[Any]:
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)
        return [(b.tolist(), torch.rand(()).item()) for _ in range(2) for b in loader]

    for kind in LOADERS:
        expected = read(LOADERS[kind]())
        loader = LOADERS[kind]()
        run, _ = made(tmp_path / kind, loader)
        assert read(loader) == expected
        run.close()
        assert read(LOADERS[kind]()) == expected


def test_a_loader_is_the_same_to_whoever_asks(tmp_path: Path) -> None:
    loader = DataLoader(range(8), 2)  # type: ignore[arg-type, var-annotated]
    before = dict(vars(loader))
    run, _ = made(tmp_path, loader)
    assert isinstance(loader, DataLoader)
    assert loader.__class__ is DataLoader
    assert vars(loader) == before
    assert len(iter(loader)) == len(loader) == 4
    for twin in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(twin) is DataLoader
        assert [b.tolist() for b in twin] == [b.tolist() for b in loader]
    run.close()
    assert type(loader) is DataLoader


def test_a_look_at_the_first_batch_takes_no_place(tmp_path: Path) -> None:
    loader = shuffled()
    run, _ = made(tmp_path / "whole", loader)
    next(iter(loader))
    whole = train(run, loader)
    run.close()
    loader = shuffled()
    run, _ = made(tmp_path / "parts", loader)
    next(iter(loader))
    parts = train(run, loader, 7)
    run.save()
    run.close()
    loader = shuffled()
    run, _ = made(tmp_path / "parts", loader, seed=2)
    assert run.resume().bit_exact  # type: ignore[union-attr]
    next(iter(loader))
    assert parts + train(run, loader) == whole
    run.close()


def test_an_evaluation_over_the_same_loader_takes_no_place(tmp_path: Path) -> None:
    def loop(run: actckpt.Checkpointer, loader: Any, until: int = -1) -> list[Any]:
        found = []
        for _ in range(run.epoch, EPOCHS):
            for batch in loader:
                found.append((batch.tolist(), torch.rand(()).item()))
                run.step()
                if run.step_count % 3 == 0:
                    sum(b.sum() for b in loader)
                if run.step_count == until:
                    run.save()
                    return found
        return found

    loader = shuffled()
    run, _ = made(tmp_path / "whole", loader)
    whole = loop(run, loader)
    run.close()
    for until in (3, 7, 9):
        loader = shuffled()
        run, _ = made(tmp_path / str(until), loader)
        parts = loop(run, loader, until)
        run.close()
        loader = shuffled()
        run, _ = made(tmp_path / str(until), loader, seed=2)
        assert run.resume().bit_exact  # type: ignore[union-attr]
        assert parts + loop(run, loader) == whole
        run.close()


def test_epochs_are_counted_where_nobody_counts_steps(tmp_path: Path) -> None:
    def loop(run: actckpt.Checkpointer, loader: Any, epochs: int) -> list[Any]:
        found = []
        for _ in range(epochs):
            found += [(batch.tolist(), torch.rand(()).item()) for batch in loader]
        return found

    loader = shuffled()
    run, _ = made(tmp_path / "whole", loader)
    whole = loop(run, loader, 4)
    run.close()
    loader = shuffled()
    run, _ = made(tmp_path / "parts", loader)
    parts = loop(run, loader, 1)
    run.save(tag="first")
    parts += loop(run, loader, 1)
    run.save(tag="second")
    run.close()
    loader = shuffled()
    run, _ = made(tmp_path / "parts", loader, seed=2)
    resumed = run.resume()
    assert resumed is not None
    assert (resumed.bit_exact, resumed.epoch, run.epoch) == (True, 2, 2)
    assert parts + loop(run, loader, 2) == whole
    run.save(tag="third")
    assert run.restore().epoch == 4
    run.close()


def test_a_wrapper_that_only_begins_by_drawing_is_exact(tmp_path: Path) -> None:
    class Wrapper:
        def __init__(self) -> None:
            data: Any = torch.arange(20.0)
            self.loader: Any = DataLoader(data, 4, shuffle=True)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.loader)

    loader = Wrapper()
    run, _ = made(tmp_path / "whole", loader)
    whole = train(run, loader)
    run.close()
    loader = Wrapper()
    run, _ = made(tmp_path / "parts", loader)
    parts = train(run, loader, 8)
    run.save()
    run.close()
    loader = Wrapper()
    run, _ = made(tmp_path / "parts", loader, seed=2)
    assert run.resume().bit_exact  # type: ignore[union-attr]
    assert parts + train(run, loader) == whole
    run.close()


def test_restored_in_a_plain_loop_it_goes_on_from_there(tmp_path: Path) -> None:
    loader = shuffled()
    run, _ = made(tmp_path, loader)
    found, restored = [], False
    for _ in range(2):
        for batch in loader:
            found.append((batch.tolist(), torch.rand(()).item()))
            run.step()
            if run.step_count == 2:
                run.save()
            if run.step_count == 4 and not restored:
                restored = True
                assert run.restore(2).bit_exact
    assert len(found) == 12
    assert found[4:6] == found[2:4]
    run.close()


def reason_of(directory: Path, loader: Any) -> str:
    run, _ = made(directory, loader)
    resumed = run.resume()
    run.close()
    assert resumed is not None
    assert not resumed.bit_exact
    return "; ".join(resumed.inexact)


@pytest.mark.kind("a loop whose data nobody watches", resumed="said no")
def test_what_was_not_seen_is_not_claimed(tmp_path: Path) -> None:
    def saved(name: str, given: Any, loop: Callable[[actckpt.Checkpointer], None]) -> str:
        run, _ = made(tmp_path / name, given)
        loop(run)
        run.save()
        run.close()
        again = given if isinstance(given, list) or given is None else shuffled()
        return reason_of(tmp_path / name, again)

    def own(run: actckpt.Checkpointer) -> None:
        train(run, shuffled(), 3)

    assert "given no loader" in saved("none", None, own)
    assert "3 of 3 steps were made on no batch that was seen" in saved("another", shuffled(), own)
    data = [torch.ones(1)] * 5

    def listed(run: actckpt.Checkpointer) -> None:
        train(run, data, 3)

    assert "cannot be watched" in saved("list", data, listed)

    loader = shuffled()

    def ahead(run: actckpt.Checkpointer) -> None:
        batches = iter(loader)
        ready = next(batches)
        for _ in range(3):
            ready.sum()
            ready = next(batches)
            run.step()

    assert "read ahead" in saved("ahead", loader, ahead)
    threaded = shuffled()

    def in_a_thread(run: actckpt.Checkpointer) -> None:
        batches: queue.Queue[Any] = queue.Queue()
        reader = threading.Thread(target=lambda: deque(map(batches.put, threaded)))
        reader.start()
        reader.join()
        for _ in range(3):
            batches.get()
            run.step()

    assert "read ahead" in saved("thread", threaded, in_a_thread)
    part = shuffled()

    def left_early(run: actckpt.Checkpointer) -> None:
        for _ in range(2):
            for _ in itertools.islice(part, 3):
                run.step()
                if run.step_count == 4:
                    return

    assert "before its end" in saved("part", part, left_early)
    both = shuffled()

    def two(run: actckpt.Checkpointer) -> None:
        for _ in zip(both, both, strict=True):
            run.step()
            if run.step_count == 2:
                return

    assert "two passes" in saved("two", both, two)


def test_a_step_that_was_counted_for_no_batch_is_said_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = shuffled()
    run, _ = made(tmp_path, loader)
    train(run, loader, 2)
    run.save()
    run.close()
    run, _ = made(tmp_path, shuffled())
    assert run.resume().bit_exact  # type: ignore[union-attr]
    train(run, shuffled(), 3)
    assert "a step was made on data from elsewhere" in caplog.text
    run.close()


@pytest.mark.kind("a stream split by worker, another number of workers", resumed="said no")
def test_a_stream_split_by_worker_is_not_resumed_with_others(tmp_path: Path) -> None:
    def loader(workers: int) -> Any:
        return DataLoader(Stream(), 2, num_workers=workers)

    run, _ = made(tmp_path, loader(2))
    for _ in run.steps():
        run.step()
        if run.step_count == 3:
            break
    run.save()
    run.close()
    for workers in (0, 1):
        run, _ = made(tmp_path, loader(workers))
        with pytest.raises(
            actckpt.CheckpointMismatchError,
            match=f"Stream, an IterableDataset that 2 workers .* has {workers}.*num_workers=2",
        ):
            run.resume()
        run.close()
    run, _ = made(tmp_path, loader(2))
    assert run.resume().bit_exact  # type: ignore[union-attr]
    assert len(list(run.steps())) == 7
    run.close()


@pytest.mark.kind("steps() in a loop over epochs", resumed="said no")
def test_a_second_call_of_steps_says_that_it_would_read_nothing(tmp_path: Path) -> None:
    run, _ = made(tmp_path, shuffled())
    for _ in run.steps():
        run.step()
    assert run.step_count == 5
    with pytest.raises(ValueError, match=r"epochs=3.*total_steps=") as raised:
        next(run.steps())
    assert len(str(raised.value).splitlines()) <= 10
    assert len(list(run.steps(epochs=2))) == 5
    run.save()
    run.restore()
    assert list(run.steps()) == []  # the run that was put back has ended
    run.close()


def test_total_steps_go_over_as_many_epochs_as_they_need(tmp_path: Path) -> None:
    run, _ = made(tmp_path, shuffled())
    for _ in run.steps(total_steps=12):
        run.step()
    assert (run.step_count, run.epoch) == (12, 2)
    run.close()
