"""No public call changes an optimizer: its groups, its state, nor anything inside of it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import actckpt
from tests.models.blocks import Chain, Residual, rows
from tests.optimizer_contents import changes, contents

pytestmark = pytest.mark.usefixtures("flat_profile")


class Tally:
    """Counts steps, as loggers of users do."""

    def __init__(self) -> None:
        self.steps = 0


class Inside(torch.optim.SGD):
    """Past updates in a deque, an object that counts, a function that leads back to itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1, momentum=0.9)
        self.past: deque[list[torch.Tensor]] = deque(maxlen=2)
        self.tally = Tally()
        self.count = functools.partial(self.counted, by=1)
        self.back: Callable[[], Inside] = lambda: self

    def counted(self, by: int) -> None:
        self.tally.steps += by
        self.back().defaults["steps"] = self.tally.steps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.past.append([p.clone() for g in self.param_groups for p in g["params"]])
        self.count()


class Wrapper(torch.optim.Optimizer):
    """Another one's groups and state through properties, with or without setters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)


class Settable(Wrapper):
    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.inner.param_groups = groups


def scheduled(model: nn.Module) -> torch.optim.Optimizer:
    """A scheduler replaces ``step`` on the instance."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    optimizer.kept = torch.optim.lr_scheduler.StepLR(optimizer, 2)  # type: ignore[attr-defined]
    return optimizer


def accelerated(model: nn.Module) -> Any:
    accelerate = pytest.importorskip("accelerate")
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def lookahead(model: nn.Module) -> Any:
    po = pytest.importorskip("pytorch_optimizer")
    return po.Lookahead(torch.optim.AdamW(model.parameters(), 0.1), k=2)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "accelerate": accelerated,
    "Lookahead": lookahead,
    "with objects inside": lambda m: Inside(m.parameters()),
    "read-only properties": lambda m: Wrapper(torch.optim.AdamW(m.parameters(), 0.1)),
    "settable properties": lambda m: Settable(torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)),
    "scheduled": scheduled,
    "foreach": lambda m: torch.optim.Adam(m.parameters(), 0.1, amsgrad=True, foreach=True),
}


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def model() -> nn.Module:
    torch.manual_seed(0)
    return Chain(*(Residual() for _ in range(2)))


def plan(m: nn.Module, o: Any, _: Path) -> None:
    actckpt.optimize(m, 1.0, batch=rows(), loss_fn=loss, optimizer=o)


def trace(m: nn.Module, o: Any, _: Path) -> None:
    assert actckpt.trace(m, rows(), loss_fn=loss, optimizer=o).optimizer_seen


def search(m: nn.Module, o: Any, _: Path) -> None:
    actckpt.find_max_batch(m, 1.0, lambda n: rows(n), loss_fn=loss, optimizer=o, limit=1)


def resume(m: nn.Module, o: Any, folder: Path) -> None:
    """Plans in the first forward after the resume, with the optimizer that was put back."""
    actckpt.optimize(m, 1.0, batch=rows(), loss_fn=loss)
    with actckpt.Checkpointer(folder, model=m, optimizer=o, every=None) as run:
        run.save()
    with actckpt.Checkpointer(folder, model=m, optimizer=o, every=None) as run:
        run.resume()
        before = contents(o)
        m(rows())
        assert not changes(before, contents(o))


@pytest.mark.kind("an optimizer in any wrapper: nothing of it is changed by a call", bits=True)
@pytest.mark.parametrize(
    ("kind", "call"),
    [*((k, plan) for k in OPTIMIZERS), ("accelerate", trace), ("Lookahead", search)],
)
def test_a_call_leaves_the_optimizer_as_it_was(
    kind: str, call: Callable[[nn.Module, Any, Path], None], tmp_path: Path
) -> None:
    m = model()
    o = OPTIMIZERS[kind](m)
    loss(m(rows())).backward()
    o.step()
    m.zero_grad()
    before = contents(o)
    call(m, o, tmp_path)
    assert not changes(before, contents(o))


@pytest.mark.parametrize("kind", ["Lookahead", "with objects inside"])
def test_a_call_leaves_an_optimizer_without_state_as_it_was(kind: str, tmp_path: Path) -> None:
    m = model()
    o = OPTIMIZERS[kind](m)
    before = contents(o)
    plan(m, o, tmp_path)
    assert not changes(before, contents(o))


@pytest.mark.parametrize("kind", ["accelerate", "scheduled"])
def test_planning_after_a_resume_leaves_the_optimizer_as_it_was(kind: str, tmp_path: Path) -> None:
    m = model()
    resume(m, OPTIMIZERS[kind](m), tmp_path)


@pytest.mark.parametrize("kind", ["accelerate", "Lookahead", "with objects inside"])
def test_a_planned_model_trains_as_the_untouched_one(kind: str) -> None:
    ends = []
    for planned in (False, True):
        m = model()
        o = OPTIMIZERS[kind](m)
        if planned:
            plan(m, o, Path())
        for seed in range(4):
            loss(m(rows(5 + seed))).backward()
            o.step()
            m.zero_grad()
        ends.append([p.detach().clone() for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], next(model().parameters()))


def test_hooks_on_all_optimizers_never_see_a_copy() -> None:
    seen: list[object] = []
    hook = register_optimizer_step_post_hook(lambda o, *_: seen.append(o))
    try:
        m = model()
        o = torch.optim.AdamW(m.parameters(), 0.1)
        plan(m, o, Path())
        assert not seen
        loss(m(rows())).backward()
        o.step()
        assert seen == [o]
    finally:
        hook.remove()
