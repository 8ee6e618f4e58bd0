"""Every public call, and the first planned forward, leaves the process and the arguments alone."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

import actckpt
from tests.exact import scalar_loss
from tests.traces_left import no_traces, process_state

WIDTH = 8
COUNTED = {"global": 0}
NUMBER = 0


class Extractor:
    """Collects features, as a user's own object does."""

    def __init__(self) -> None:
        self.features: dict[str, list[torch.Tensor]] = {"all": []}
        self.count = 0

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.features["all"].append(output)
        self.count += 1


class Block(nn.Module):
    """Counts in every way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.log = Extractor()
        self.seen: list[torch.Tensor] = []
        self.rngs = (random.Random(0), np.random.default_rng(0), np.random.RandomState(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global NUMBER
        NUMBER += 1
        COUNTED["global"] += 1
        self.log.count += 1
        scale = 1 + sum(float(rng.random()) for rng in self.rngs)
        y = torch.tanh(self.norm(self.first(x)) * scale)
        self.seen.append(y)
        out: torch.Tensor = self.dropout(y) + x
        return out


class _Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Objects:
    """All that a user passes to us."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.blocks = [Block(), Block()]
        self.model = nn.Sequential(*self.blocks, nn.Linear(WIDTH, WIDTH))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = OneCycleLR(self.optimizer, 1e-2, total_steps=50)
        self.batch = torch.randn(4, WIDTH)
        self.loader = DataLoader(TensorDataset(torch.randn(8, WIDTH)), 4, shuffle=True)
        self.collected: list[torch.Tensor] = []
        self.extractor = Extractor()
        self.calls = 0

        def collect(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.collected.append(output)
            self.calls += 1

        self.blocks[0].register_forward_hook(collect)
        self.blocks[1].register_forward_hook(self.extractor)
        self.blocks[1].first.register_full_backward_hook(
            lambda module, grads, _: self.collected.extend(grads)
        )
        scalar_loss(self.model(self.batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def named(self) -> dict[str, Any]:
        return {**vars(self), "counted": COUNTED, "number": lambda: NUMBER}


def _training(objects: Objects) -> dict[str, Any]:
    return {"loss_fn": scalar_loss, "optimizer": objects.optimizer}


def _optimize(objects: Objects) -> None:
    actckpt.optimize(objects.model, 1.0, batch=objects.batch, policy="full", **_training(objects))


def _too_small(objects: Objects) -> None:
    with pytest.raises(actckpt.BudgetError):
        actckpt.optimize(objects.model, 1e-9, batch=objects.batch, **_training(objects))


def _optimize_and_revert(objects: Objects) -> None:
    _optimize(objects)
    actckpt.report(objects.model)
    actckpt.revert(objects.model)


# planning is bound to run everything twice or more; who counts must not see it
def _save(objects: Objects) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = actckpt.Checkpointer(
            folder,
            model=objects.model,
            optimizer=objects.optimizer,
            scheduler=objects.scheduler,
            loader=objects.loader,
        )
        assert run.resume() is None
        run.save()
        run.close()


CALLS: dict[str, Callable[[Objects], Any]] = {
    "trace": lambda o: actckpt.trace(o.model, o.batch, **_training(o)),
    "optimize": _optimize,
    "optimize that fails": _too_small,
    "optimize and revert": _optimize_and_revert,
    "measure": lambda o: actckpt.measure(o.model, o.batch, steps=1, **_training(o)),
    "find_max_batch": lambda o: actckpt.find_max_batch(
        o.model, 1.0, lambda n: torch.ones(n, WIDTH), start=2, limit=2, **_training(o)
    ),
    "a checkpoint": _save,
}


@pytest.fixture
def circumstances() -> Iterator[None]:
    """A process in which nothing is as it is by default."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
        stack.enter_context(_Watching())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield


@pytest.mark.kind("a public call leaves the process and its arguments alone")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("flat_profile", "circumstances")
def test_calls_leave_no_trace(call: str) -> None:
    objects, number = Objects(), NUMBER
    with no_traces(**objects.named()):
        CALLS[call](objects)
    assert number == NUMBER


@pytest.mark.kind("the first planned forward leaves no more than the untouched one", bits=True)
@pytest.mark.usefixtures("flat_profile", "circumstances")
def test_first_planned_forward_leaves_what_the_untouched_one_does() -> None:
    left = []
    for planned in (False, True):
        objects, number, counted = Objects(), NUMBER, COUNTED["global"]
        if planned:
            actckpt.optimize(objects.model, 1.0, policy="full", loss_fn=scalar_loss)
        torch.manual_seed(1)
        output = objects.model(objects.batch)
        logs = [(m.log.count, [t.clone() for t in m.seen]) for m in objects.blocks]
        features = [*objects.extractor.features["all"], *objects.collected]
        assert not any(isinstance(t, FakeTensor) for t in features)
        left.append(
            (
                process_state(),
                [t.detach().clone() for t in (output, *objects.model.buffers(), *features)],
                (logs, objects.calls, objects.extractor.count),
                (NUMBER - number, COUNTED["global"] - counted),
            )
        )
    untouched, ours = left
    assert untouched[0] == ours[0]
    assert all(map(torch.equal, untouched[1], ours[1]))
    assert repr(untouched[2:]) == repr(ours[2:])
