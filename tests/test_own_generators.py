"""Random generators that a run has of its own: saved and put back, or named as what nobody can."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import actckpt
from actckpt.resuming.generators import generators_of
from actckpt.resuming.reachable import reachable

SIZE, BATCH, STOP, STEPS = 24, 4, 8, 14  # six batches an epoch
KINDS: dict[str, Callable[[int], Any]] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": np.random.default_rng,
    "numpy, old": np.random.RandomState,
    "python": random.Random,
}
# what functions and classes of this file refer to by name
shared: Any = None


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


class Data(Dataset[Any]):
    """Rows; with noise where it has something to draw it from."""

    def __init__(self, generator: Any = None) -> None:
        self.tools = {"noise": [generator]}

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        (generator,) = self.tools["noise"]
        return torch.tensor([index + (draw(generator) if generator else 0.0)])


class Buckets(Sampler[Any]):
    """An order drawn when an epoch begins, from a generator that goes on from epoch to epoch."""

    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(SIZE), key=lambda _: draw(self.rng)))


class Noise(nn.Module):
    def __init__(self, generator: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.options = [{"generator": generator}]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = self.options[0]["generator"]
        out: torch.Tensor = self.linear(x) * (1 + (draw(generator) if generator else 0.0))
        return out


class Named(Noise):
    """It draws from what its file has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x) * draw(shared)
        return out


class Kept(Noise):
    """It draws from what its class has."""

    rng: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x) * draw(self.rng)
        return out


class Helper:
    """Something of the user's whose state leaves out what it draws from."""

    __slots__ = ("generator",)

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Stream(IterableDataset[Any]):
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        for n in range(SIZE):
            yield torch.tensor([n + draw(self.generator)])


def collate_with(generator: Any) -> Callable[[Any], torch.Tensor]:
    def collate(rows: Any) -> torch.Tensor:
        return torch.stack(rows) * draw(generator)

    return collate


def collate_partly(rows: Any, generator: Any) -> torch.Tensor:
    return torch.stack(rows) * draw(generator)


def collate_shared(rows: Any) -> torch.Tensor:
    return torch.stack(rows) * draw(shared)


def _plain(**more: Any) -> Any:
    return DataLoader(Data(), BATCH, shuffle=True, **more)


def _shared(generator: Any) -> Any:
    global shared
    shared = generator
    return generator


def _kept(generator: Any) -> nn.Module:
    Kept.rng = generator
    return Kept()


# who holds it: (model, loader, helper)
HOLDERS: dict[str, Callable[[Any], tuple[nn.Module, Any, Any]]] = {
    "module": lambda g: (Noise(g), _plain(), None),
    "extra": lambda g: (Noise(), _plain(), Helper(g)),
    "dataset": lambda g: (Noise(), DataLoader(Data(g), BATCH, shuffle=True), None),
    "stream": lambda g: (Noise(), DataLoader(Stream(g), BATCH), None),
    "sampler": lambda g: (Noise(), DataLoader(Data(), BATCH, sampler=Buckets(g)), None),
    "closure": lambda g: (Noise(), _plain(collate_fn=collate_with(g)), None),
    "partial": lambda g: (
        Noise(),
        _plain(collate_fn=functools.partial(collate_partly, generator=g)),
        None,
    ),
    "global of a function": lambda g: (
        Noise(),
        _plain(collate_fn=_shared(g) and collate_shared),
        None,
    ),
    "global of a method": lambda g: (Named(), _plain(), _shared(g) and None),
    "class": lambda g: (_kept(g), _plain(), None),
    "two places": lambda g: (Noise(g), DataLoader(Data(g), BATCH, shuffle=True), Helper(g)),
}


def train(
    directory: Path, made: tuple[nn.Module, Any, Any], until: int, *, seed: int
) -> tuple[list[Any], Any]:
    """What is seen of the steps from where a run was left up to ``until``, and how it came back."""
    torch.manual_seed(seed)
    model, loader, helper = made
    extra = {"helper": helper} if helper else {}
    run = actckpt.Checkpointer(
        directory, model=model, loader=loader, extra=extra, every=None, keep_last=None
    )
    seen = []
    with run:
        resumed = run.resume()
        for step, batch in run.steps(epochs=None, total_steps=until):
            drawn = draw(helper.generator) if helper else 0.0
            seen.append((step, batch.tolist(), model(batch).tolist(), drawn))
            run.step()
            if step + 1 == STOP:
                run.save()
    return seen, resumed


@pytest.mark.kind("a generator of the run's own", resumed="exact")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_it_goes_on_where_it_was(holder: str, kind: str, tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(3)
        return HOLDERS[holder](KINDS[kind](seed))

    whole, _ = train(tmp_path, made(1), STEPS, seed=5)
    # it went on after that step: what is put back is what it was then
    rest, resumed = train(tmp_path, made(2), STEPS, seed=6)
    assert resumed.bit_exact, resumed
    assert resumed.step == STOP
    assert rest == whole[STOP:]


def test_between_two_epochs_too(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(3)
        return Noise(), DataLoader(Data(), BATCH, sampler=Buckets(random.Random(seed))), None

    whole, _ = train(tmp_path / "whole", made(1), 12, seed=5)
    for directory, seed in ((tmp_path / "a", 1), (tmp_path / "a", 2)):
        model, loader, _ = made(seed)
        torch.manual_seed(seed)
        with actckpt.Checkpointer(directory, model=model, loader=loader, every=None) as run:
            resumed = run.resume()
            rest = [b.tolist() for _, b in run.steps(epochs=run.epoch + 1)]
            run.save()
    assert resumed is not None
    assert resumed.bit_exact
    assert rest == [batch for _, batch, *_ in whole[6:]]


class Odd(random.Random):
    def getstate(self) -> Any:
        return object()


def _running() -> Iterator[float]:
    while True:
        yield random.random()


def _held(generator: Any) -> Any:
    next(generator)
    return generator


@pytest.mark.kind("a generator that nobody can save", resumed="said no")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (random.SystemRandom, "draws from the operating system"),
        (Odd, r"state of model\.options\[0\]\['generator'\] cannot be saved"),
        (lambda: {random.Random(1)}, "in a set, which has no order"),
        (lambda: _held(_running()), "a Python generator, whose place cannot be saved"),
    ],
    ids=["system", "odd", "set", "python generator"],
)
def test_what_cannot_be_saved_is_named(make: Any, reason: str, tmp_path: Path) -> None:
    model = Noise()
    model.options[0]["generator"] = make()
    for _ in range(2):
        with actckpt.Checkpointer(tmp_path, model=model, every=None) as run:
            resumed = run.resume()
            run.save()
    assert resumed is not None
    assert not resumed.bit_exact
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(resumed))


@pytest.mark.kind("generators in a loader's workers", resumed="said no")
def test_copies_in_workers_are_named(tmp_path: Path) -> None:
    def resumed_after(directory: str, batches: int) -> Any:
        for _ in range(2):
            data = actckpt.SeededSamples(Data(random.Random(1)))
            loader = DataLoader(data, BATCH, num_workers=1)
            run = actckpt.Checkpointer(
                tmp_path / directory, model=nn.Linear(1, 1), loader=loader, every=None
            )
            with run:
                resumed = run.resume()
                for step, _ in run.steps(epochs=1, total_steps=batches):
                    run.step()
                    if step + 1 == batches:
                        run.save()
        return resumed

    (reason,) = resumed_after("amid", 2).inexact
    assert reason.startswith("loader.dataset.dataset.tools['noise'][0] draws in the loader's wor")


def test_one_that_is_gone_or_new_is_named(tmp_path: Path) -> None:
    one, other = np.random.default_rng(1), random.Random(1)
    with actckpt.Checkpointer(tmp_path, model=Noise(one), every=None) as run:
        run.save()
    path = r"model.options[0]['generator']"
    for generator, reasons in (
        (one, ()),
        (None, (f"the generator {path} that was saved is not here",)),
        (other, (f"the generator {path} that was saved is not here",)),
    ):
        with actckpt.Checkpointer(tmp_path, model=Noise(generator), every=None) as run:
            resumed = run.resume()
            assert resumed is not None
            assert resumed.inexact == reasons
    with actckpt.Checkpointer(tmp_path / "none", model=Noise(), every=None) as run:
        run.save()
    with actckpt.Checkpointer(tmp_path / "none", model=Noise(one), every=None) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.inexact == (f"the state of the generator {path} was not saved",)


def test_global_generators_are_none_of_the_runs_own() -> None:
    model = Noise(torch.default_generator)
    everything = [np.random.mtrand._rand, random._inst, random, np.random]
    model.options += [{"generator": x} for x in everything]
    assert generators_of({"model": model}).by_path == {}


def test_the_search_is_bounded_and_says_so() -> None:
    deep: list[Any] = [random.Random(1)]
    for _ in range(50):
        deep = [deep]
    assert list(generators_of({"x": deep}).by_path) == ["x" + "[0]" * 51]
    assert sum(1 for _ in reachable({"x": deep}, most=9)) == 9
    long = [[n] for n in range(5_000)]
    assert sum(1 for _ in reachable({"x": long})) < 1_200
    ring: list[Any] = []
    ring.append(ring)
    assert sum(1 for _ in reachable({"x": ring})) == 1
    wide = [[[[k, n]] for n in range(999)] for k in range(60)]
    (said,) = generators_of({"x": wide}).unsaved
    assert "more than 50,000 objects" in said
