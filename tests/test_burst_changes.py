"""Recomputation by operations on forwards that are not the traced one: exact, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import PlanError, ReplayError
from actckpt.session.session import session_of
from actckpt.tracing.call import Call
from tests import exact
from tests.burst_plans import drawn, each_alone, everything
from tests.exact import enforce, outcome, scalar_loss
from tests.models.blocks import Chain, Residual, chain, rows
from tests.suite import seeded


class Scaled(nn.Module):
    """A factor that its owner changes between steps."""

    factor = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x) * self.factor
        out: torch.Tensor = hidden * hidden.tanh() + x
        return out


class Sharpened(Scaled):
    """Only the hyperbolic tangent is saved: whatever makes it again multiplies by the factor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (self.linear(x) * self.factor).tanh()
        return out


class Flat(Scaled):
    """No modules but one: there is nothing to recompute by calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = (self.linear(x) * self.factor).tanh()
        return x


class Normed(nn.Module):
    """Batch normalization with cumulative averages, which divides by the number of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.linear(x)).tanh() + x
        return out


class Counted(nn.Module):
    """Replaces its counter, and divides by it."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("steps", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps = self.steps + 1
        out: torch.Tensor = (self.linear(x) / self.steps.item()).tanh() + x
        return out


class Cast(nn.Module):
    """Autocast inside, which its owner switches between steps; no torch function tells of it."""

    cast = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
            y = self.linear(x).tanh().sin()
        out: torch.Tensor = y + x
        return out


class Crossed(nn.Module):
    """The same calls in the same order, on one tensor or the other."""

    swap = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).tanh(), self.b(x).tanh()
        out: torch.Tensor = self.c((right if self.swap else left).sigmoid()) + left * right
        return out


class Biased(nn.Module):
    """A bias that is computed, or none: in place of a tensor that has died."""

    bias = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor | None = self.vector * 2
        if not self.bias:
            bias = None
        # where only the weight learns, autograd saves the same with a bias as without
        y = nn.functional.linear(x.detach(), self.linear.weight, bias)
        return torch.sigmoid(torch.tanh(y)) + x


class Reused(Crossed):
    """A tensor that no call has returned, where one has died that a call had."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).tanh(), self.b(x).tanh().t()
        if self.swap:
            del left  # its id is free
            left = right.mT
        out: torch.Tensor = self.c(left.sigmoid().sin()) + x
        return out


class Turned(Crossed):
    """The attribute of one tensor or of another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).tanh().t(), self.b(x).tanh().t()
        out: torch.Tensor = self.c((right if self.swap else left).mT.sigmoid().sin()) + x
        return out


class Unknown(Crossed):
    """An alias of one tensor or of another, made by what is no torch function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).tanh(), self.b(x).tanh()
        alias = torch.Tensor._make_subclass(torch.Tensor, right if self.swap else left)
        out: torch.Tensor = self.c(alias) + left * right
        return out


class Frozen(nn.Module):
    """A product with a parameter that is frozen between steps: the same call saves less."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8, 8))

    @property
    def frozen(self) -> bool:
        return not self.scale.requires_grad

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self.scale.requires_grad_(not value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.linear(x).sigmoid().sin()
        out: torch.Tensor = (self.scale * inner if self.first else inner * self.scale) + x
        return out


class Muted(nn.Module):
    """A part whose gradients are wanted in some steps only."""

    learns = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.learns):
            part = self.a(x).sigmoid().tanh()
        out: torch.Tensor = self.b(part.sin().sigmoid()).tanh() + x
        return out


class Branches(nn.Module):
    """Leaves out a part, or adds one."""

    more = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[: 3 + self.more]:
            x = block(x).sin()
        return x


def changing(model: nn.Module, name: str, value: Any) -> exact.Body:
    """A step before whose second run an attribute of every module that has it is changed."""
    count = [0]

    def run(root: nn.Module, call: Call) -> Any:
        for module in root.modules():
            if count[0] and hasattr(type(module), name):
                setattr(module, name, value)
        count[0] += 1
        return exact.body(root, call)

    return run


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Scaled, "factor", 0.7),
        (Cast, "cast", False),
        (Crossed, "swap", True),
        (Reused, "swap", True),
        (Biased, "bias", False),
        (Turned, "swap", True),
        (Muted, "learns", False),
        (Branches, "more", 1),
        (Branches, "more", -1),
    ],
)
@pytest.mark.parametrize("wanted", [everything, each_alone, drawn(1)], ids=["all", "each", "drawn"])
def test_a_forward_that_changes_keeps_its_gradients(
    kind: type[nn.Module], name: str, value: Any, wanted: exact.MakePlan
) -> None:
    make = seeded(lambda: Chain(kind(), kind()))
    expected = outcome(make(), rows(), changing(make(), name, value))
    model = make()
    enforce(model, rows(), wanted)
    found = outcome(model, rows(), changing(model, name, value))
    assert not exact.differences(expected, found)
    assert model.__dict__["forward"].rewrite.diverged


@pytest.mark.parametrize("wanted", [everything, each_alone], ids=["all", "each"])
def test_what_nothing_is_known_of_is_not_made_again(wanted: exact.MakePlan) -> None:
    make = seeded(lambda: Chain(Unknown(), Unknown()))
    expected = outcome(make(), rows(), changing(make(), "swap", True))
    model = make()
    enforce(model, rows(), wanted)
    assert not exact.differences(expected, outcome(model, rows(), changing(model, "swap", True)))


@pytest.mark.parametrize("first", [False, True], ids=["less", "another"])
def test_a_call_that_saves_other_tensors_keeps_them(first: bool) -> None:
    make = seeded(lambda: Chain(Frozen(first), Frozen(first)))
    expected = outcome(make(), rows(8), changing(make(), "frozen", True))
    model = make()
    enforce(model, rows(8), everything)
    assert not exact.differences(expected, outcome(model, rows(8), changing(model, "frozen", True)))
    assert model.__dict__["forward"].rewrite.diverged


def test_a_first_call_that_saves_another_tensor_than_was_dropped_is_refused() -> None:
    frozen = Frozen(first=True)
    model = Chain(frozen, Frozen(first=True))
    enforce(model, rows(8), everything)
    frozen.frozen = True
    with pytest.raises(ReplayError, match="requires_grad"):
        model(rows(8))


@pytest.mark.usefixtures("flat_profile")
def test_a_session_recomputes_by_calls_once_the_forward_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = seeded(lambda: Chain(*(Sharpened() for _ in range(6))))
    model, twin, batch = make(), make(), rows(512)
    whole = actckpt.measure(twin, batch, loss_fn=scalar_loss, steps=1)
    budget = 0.8 * whole.peak_bytes / 1e9
    actckpt.optimize(model, budget, batch=batch, loss_fn=scalar_loss, policy="optimal")
    assert actckpt.report(model).plan.bursts
    with caplog.at_level(logging.INFO, logger="actckpt"):
        for step in range(3):
            for block in (*model.modules(), *twin.modules()):
                if isinstance(block, Scaled):
                    block.factor = 1.5 + step
            for m in (model, twin):
                m.zero_grad()
                scalar_loss(m(batch)).backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                assert torch.equal(p.grad, q.grad)
    plan = actckpt.report(model).plan
    assert plan.regions
    assert not plan.bursts
    assert sum("from now on" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.usefixtures("flat_profile")
def test_a_session_plans_by_operations_again_where_calls_do_not_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = seeded(Flat)
    model, twin, batch = make(), make(), rows(512)
    whole = actckpt.measure(make(), batch, loss_fn=scalar_loss, steps=1)
    budget_bytes = int(0.7 * whole.peak_bytes)
    with pytest.raises(actckpt.BudgetError):
        actckpt.optimize(
            make(), budget_bytes / 1e9, batch=batch, loss_fn=scalar_loss, policy="calls"
        )
    actckpt.optimize(model, budget_bytes / 1e9, batch=batch, loss_fn=scalar_loss)
    first = actckpt.report(model).plan
    with caplog.at_level(logging.INFO, logger="actckpt"):
        for factor in (1.5, 0.7, 0.7, 1.1, 1.1, 1.1):
            for m in (model, twin):
                assert isinstance(m, Flat)
                m.factor = factor
            expected, found = outcome(twin, batch), outcome(model, batch)
            assert not exact.differences(expected, found)
    messages = [r.getMessage() for r in caplog.records]
    assert sum("as it is now" in m for m in messages) == 2  # one for each change
    assert actckpt.report(model).plan.bursts
    assert actckpt.report(model).plan == first
    # after another batch it is not the plan of a forward before that comes back
    outcome(model, rows(64))
    with caplog.at_level(logging.INFO, logger="actckpt"):
        caplog.clear()
        outcome(model, batch)
    assert not caplog.records
    peak = actckpt.measure(model, batch, loss_fn=scalar_loss, steps=1).peak_bytes
    assert peak <= budget_bytes


@pytest.mark.usefixtures("flat_profile")
@pytest.mark.parametrize("kind", [Normed, Counted])
def test_a_counter_that_is_asked_for_its_number_is_planned_by_calls_at_once(
    kind: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    """It is another one in every step: the first would be the last that can be followed."""
    make = seeded(lambda: Chain(*(kind() for _ in range(6))))
    model, batch = make(), rows(512)
    whole = actckpt.measure(make(), batch, loss_fn=scalar_loss, steps=1)
    with caplog.at_level(logging.INFO, logger="actckpt"):
        actckpt.optimize(model, 0.8 * whole.peak_bytes / 1e9, batch=batch, loss_fn=scalar_loss)
        assert not exact.differences(outcome(make(), batch), outcome(model, batch))
    plan = actckpt.report(model).plan
    assert plan.regions
    assert not plan.bursts
    assert not any("is not the one" in r.getMessage() for r in caplog.records)
    with pytest.raises(PlanError, match=r"blocks\.0.* asks for a number that every step changes"):
        actckpt.optimize(make(), 0.001, batch=batch, loss_fn=scalar_loss, policy="optimal")


def test_other_shapes_are_planned_by_calls_and_covered() -> None:
    model = seeded(chain(6))()
    batch = rows(512)
    whole = actckpt.measure(model, batch, loss_fn=scalar_loss, steps=1)
    budget = 0.85 * whole.peak_bytes / 1e9
    actckpt.optimize(model, budget, batch=batch, loss_fn=scalar_loss, policy="optimal")
    session = session_of(model)
    assert session is not None
    for size in (500, 300, 499, 512):
        model.zero_grad()
        scalar_loss(model(rows(size))).backward()
    assert [bool(e.planned.plan.bursts) for e in session.entries] == [True, False]
    assert session.current is session.entries[0]
