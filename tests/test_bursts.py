"""Recomputation by operations: exact on every kind of forward, and in all of autograd's ways."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan
from actckpt.errors import PlanError, ReplayError
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.planning import search
from actckpt.planning.dry_run import dry_run
from actckpt.tracing.call import Call
from tests import exact
from tests.burst_plans import drawn, each_alone, everything, from_the_batch
from tests.exact import assert_exact, enforce, outcome, scalar_loss, seed_all
from tests.models.blocks import Chain, Residual, chain, rows
from tests.models.custom_function import CustomFunctionModel
from tests.models.lstm import LSTMLanguageModel
from tests.models.unet import UNet
from tests.suite import seeded


class InPlace(nn.Module):
    """Changes its own activations in place, and reads through windows of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).tanh_()
        hidden = hidden * 2
        hidden += x
        left, right = hidden.chunk(2, dim=-1)
        out: torch.Tensor = self.second(left.tanh() * right.transpose(0, 1).mean(1)) + x
        return out


class Turned(nn.Module):
    """Changes in place how its activations lie, and none of their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        both = torch.stack([hidden.sin(), hidden.cos()]).transpose_(0, 1)
        both = both.unsqueeze_(0).squeeze_(0).contiguous().flatten(1)
        out: torch.Tensor = self.second(both.tanh()) + x
        return out


class Draws(nn.Module):
    """Several kinds of random operations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.linear(x), 0.3) + 0.1 * torch.randn_like(x)
        return nn.functional.dropout(x.tanh() * torch.rand(8), 0.2, training=True) + x


class Halved(nn.Module):
    """Reads two windows of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        out: torch.Tensor = self.linear((left + right).tanh())
        return out


class Normed(nn.Module):
    """A convolution with BatchNorm, whose statistics move once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(x[:, None])).relu().mean(1) + x
        return out


class Settled(Normed):
    """Its statistics are frozen: they are read, and do not move."""

    def train(self, mode: bool = True) -> Settled:
        super().train(mode)
        self.norm.eval()
        return self


MAKES: dict[str, Callable[[], nn.Module]] = {
    "residual": chain(3),
    "halved": lambda: Chain(Halved(), Halved()),
    "dropout": chain(3, 0.2),
    "draws": lambda: Chain(Draws(), Draws()),
    "in place": lambda: Chain(InPlace(), InPlace()),
    "turned": lambda: Chain(Turned(), Turned()),
    "batchnorm": lambda: Chain(Normed(), Normed()),
    "frozen statistics": lambda: Chain(Settled(), Settled()).train(),
}
PLANS: dict[str, exact.MakePlan] = {
    "everything": everything,
    "each alone": each_alone,
    "from the batch": from_the_batch,
} | {f"drawn {n}": drawn(n) for n in range(6)}


@pytest.mark.parametrize("wanted", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_any_bursts_are_exact(make: exact.Make, wanted: exact.MakePlan) -> None:
    assert_exact(make, rows, wanted, check=False, must_replay=False)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["unet", "custom_function", "lstm"])
def test_drawn_bursts_on_whole_models_are_exact(kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(1)
    models: dict[str, tuple[exact.Make, torch.Tensor]] = {
        "unet": (lambda: UNet(width=4, depth=2), torch.randn(2, 3, 16, 16, generator=g)),
        "custom_function": (lambda: CustomFunctionModel(), rows(16, 64)),
        "lstm": (lambda: LSTMLanguageModel(), torch.arange(64).view(4, 16)),
    }
    make, batch = models[kind]
    assert_exact(make, lambda: batch, drawn(seed), check=False, must_replay=False)


def test_every_burst_runs_its_operations_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from actckpt.rewriting import scheduled
    from actckpt.rewriting.bursting import run_steps

    runs: list[int] = []

    def counted(schedule: Any, burst: Any, *rest: Any) -> None:
        runs.append(len(burst.steps))
        run_steps(schedule, burst, *rest)

    monkeypatch.setattr(scheduled, "run_steps", counted)
    model = seeded(chain(3))()
    force = enforce(model, rows(), each_alone)
    outcome(model, rows(), steps=1)
    assert force.program.schedule is not None
    assert sorted(runs) == sorted(len(b.steps) for b in force.program.schedule.bursts)


# ---- autograd's ways


def test_partial_and_repeated_backwards_and_two_forwards_are_exact() -> None:
    def run(model: nn.Module, call: Call) -> Any:
        first, second = model(*call.args), model(*call.args)
        scalar_loss(second).backward(retain_graph=True)
        scalar_loss(second.cos()).backward()
        first[:, :2].sum().backward()
        return second

    for wanted in (everything, each_alone, drawn(2)):
        assert_exact(chain(3, 0.1), rows, wanted, run=run, must_replay=False)


def test_a_batch_that_is_a_window_of_a_larger_tensor() -> None:
    whole = rows(40)
    make = seeded(lambda: Chain(Halved(), Residual()))
    model, twin = make(), make()
    enforce(model, whole[:5], from_the_batch)
    for start in (0, 5, 20):
        for m in (model, twin):
            m.zero_grad()
            scalar_loss(m(whole[start : start + 5])).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert not model.__dict__["forward"].rewrite.diverged


def test_parameters_changed_before_backward_raise() -> None:
    model = seeded(chain(2))()
    enforce(model, rows(), everything)
    loss = scalar_loss(model(rows()))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_left_after_backward_and_no_cycle_holds_it() -> None:
    model = seeded(chain(3))()
    enforce(model, rows(), drawn(3))
    gc.collect()
    gc.disable()
    try:
        loss = scalar_loss(model(rows()))
        node: Any = loss.grad_fn
        loss.backward()
        del loss, node
        held = scalar_loss(model(rows()))
        ref = weakref.ref(held)
        del held
        assert ref() is None
        runs = [o for o in gc.get_objects() if type(o).__name__ == "ScheduledRun"]
        assert not runs
    finally:
        gc.enable()


# ---- plans that do not fit


def graph_of(make: exact.Make) -> Graph:
    return actckpt.trace(seeded(make)(), rows(), loss_fn=scalar_loss)


def test_plans_read_back_and_are_checked() -> None:
    graph = graph_of(chain(3))
    plan = drawn(4)(graph)
    assert Plan.from_json(json.dumps(plan.to_json())) == plan
    possible = Recomputation(graph)
    (burst, *_) = plan.bursts
    broken = {
        "cannot be dropped": Burst(burst.ops[1:], burst.drops, burst.inner),
        "ascending": Burst(burst.ops[::-1], burst.drops),
        "cannot be run again": Burst((10**6,), ()),
    }
    for message, wrong in broken.items():
        with pytest.raises(PlanError, match=message):
            place_bursts(possible, Plan("", bursts=(wrong,)))
    with pytest.raises(PlanError, match="cannot be dropped"):
        place_bursts(possible, Plan("", bursts=(burst, burst)))
    with pytest.raises(PlanError, match="either by calls"):
        place_bursts(possible, Plan("", (exact.region("blocks.0"),), bursts=(burst,)))


def test_what_the_user_sees_is_no_source() -> None:
    seed_all()
    graph = graph_of(chain(2))
    possible = Recomputation(graph)
    returned = {graph.values[v].storage for v in graph.stages[0].outputs}
    saved = {graph.values[s.value].storage for s in graph.saves}
    assert returned - saved
    assert all(possible.source(s) is None for s in returned - saved)


def test_a_dry_run_that_leaves_the_trace_is_planned_by_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps everything from there on: that it does not fit says nothing of a smaller plan."""
    asked: list[str] = []

    def leaving(model: Any, step: Any, graph: Any, program: Any, *rest: Any) -> Any:
        found = dry_run(model, step, graph, program, *rest)
        asked.append("operations" if program.schedule is not None else "calls")
        if program.schedule is None:
            return found
        return replace(found, diverged="another value", peak_bytes=2 * found.peak_bytes)

    model = seeded(chain(8))()
    whole = actckpt.measure(seeded(chain(8))(), rows(512), loss_fn=scalar_loss, steps=1)
    budget_gb = 0.9 * whole.peak_bytes / 1e9
    monkeypatch.setattr(search, "dry_run", leaving)
    actckpt.optimize(model, budget_gb, batch=rows(512), loss_fn=scalar_loss, policy="optimal")
    assert actckpt.report(model).plan.regions
    assert asked[:2] == ["operations", "calls"]


def test_a_dry_run_that_cannot_replay_is_planned_by_calls(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dry = dry_run

    def failing(model: Any, step: Any, graph: Any, program: Any, *rest: Any) -> Any:
        if program.schedule is not None:
            raise ReplayError("as an operation would that nobody thought of")
        return dry(model, step, graph, program, *rest)

    model = seeded(chain(8))()
    whole = actckpt.measure(seeded(chain(8))(), rows(512), loss_fn=scalar_loss, steps=1)
    budget_gb = 0.9 * whole.peak_bytes / 1e9
    monkeypatch.setattr(search, "dry_run", failing)
    with caplog.at_level(logging.INFO, logger="actckpt"):
        actckpt.optimize(model, budget_gb, batch=rows(512), loss_fn=scalar_loss, policy="optimal")
    assert actckpt.report(model).plan.regions
    assert any("nobody thought of" in r.getMessage() for r in caplog.records)
    actckpt.revert(model)

    def tracing_by_hand(graph: Graph, profile: Any, budget_bytes: int | None) -> Plan:
        return everything(graph)

    with pytest.raises(ReplayError, match="nobody thought of"):
        actckpt.optimize(
            model, budget_gb, batch=rows(512), loss_fn=scalar_loss, policy=tracing_by_hand
        )
    assert "forward" not in model.__dict__
