"""Bad input is named, and the model is afterwards as it was before the call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.budget_error import BudgetError
from actckpt.data.plan import Plan, Region, SavedOp
from actckpt.errors import PlanError, ReplayError, TraceError
from actckpt.rewriting.installing import installed
from tests.exact import differences, outcome, plan, region, scalar_loss
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that nothing about the model or the random states is another on exit."""
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
    grads = [p.grad for p in model.parameters()]
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    attributes = [dict(m.__dict__) for m in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    yield
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(g is not None and bool((g == 0.5).all()) for g in grads)
    now = (*model.parameters(), *model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(tensors, now, strict=True))
    assert versions == [t._version for t in now]
    for module, before in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[k] is v for k, v in before.items() if k != "forward")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), repr(np.random.get_state()))


def model_of_all_kinds() -> nn.Module:
    model = Chain(Residual(p=0.1), nn.BatchNorm1d(WIDTH), Residual(p=0.1))
    return model.train()


def refused(
    error: type[Exception] | tuple[type[Exception], ...],
    match: str | None,
    budget: Any,
    model: nn.Module | None = None,
    **kwargs: Any,
) -> Any:
    """``optimize`` raises, and changes nothing; returns the error."""
    model = model_of_all_kinds() if model is None else model
    kwargs = {"batch": rows(), "loss_fn": scalar_loss, **kwargs}
    with unchanged(model), pytest.raises(error, match=match) as caught:
        actckpt.optimize(model, budget, **kwargs)
    assert len(str(caught.value).splitlines()) <= 10
    assert installed(model) is None
    assert not any("forward" in m.__dict__ for m in model.modules())
    return caught.value


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, float("nan"), float("inf"), -float("inf")])
def test_budgets_that_are_not_positive(budget: float) -> None:
    refused(BudgetError, "positive", budget)


@pytest.mark.parametrize("budget", ["eight", b"8", [8], (8,), {}, True, 8j, object()])
def test_budgets_that_are_no_number(budget: Any) -> None:
    refused((BudgetError, TypeError), "number", budget)


def test_no_budget_needs_a_policy() -> None:
    refused(BudgetError, "policy", None)


def test_budgets_below_the_smallest_reachable() -> None:
    error = refused(BudgetError, "(?s)GB.*parameters|GB.*activations", 1e-9, batch=rows(64))
    assert error.budget_bytes == 1
    assert error.smallest_bytes > 1
    model = model_of_all_kinds()
    actckpt.optimize(model, error.smallest_bytes * 1.01 / 1e9, batch=rows(64), loss_fn=scalar_loss)


@pytest.mark.parametrize("policy", ["full", "sqrt", "log", "selective", "none"])
def test_budgets_below_what_a_named_policy_reaches(policy: str) -> None:
    error = refused(BudgetError, policy, 1e-9, policy=policy, batch=rows(64))
    assert error.smallest_bytes > error.budget_bytes


def test_the_scope_of_activations_too() -> None:
    refused(BudgetError, "activations", 1e-9, scope="activations", batch=rows(64))


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (torch.zeros(3, WIDTH + 1), RuntimeError, None),
        ((rows(), rows()), TypeError, "positional"),
        ({"nothing": rows()}, TypeError, "unexpected keyword"),
        (actckpt.Call(), TypeError, "missing"),
        ("text", TypeError, "batch must be"),
        ([rows()], TypeError, "batch must be"),
        (3, TypeError, "batch must be"),
    ],
)
def test_batches_that_do_not_match_forward(
    batch: Any, error: type[Exception], match: str | None
) -> None:
    found = refused(error, match, 1.0, batch=batch)
    if error is RuntimeError:
        assert any("while tracing" in note for note in found.__notes__)


def test_losses_that_are_none() -> None:
    refused(TraceError, "scalar", 1.0, loss_fn=lambda out: out)
    refused(TraceError, "scalar", 1.0, loss_fn=lambda out: 3.0)
    refused(TraceError, "require gradients", 1.0, loss_fn=lambda out: out.detach().sum())

    def fails(out: torch.Tensor) -> torch.Tensor:
        raise KeyError("the user's own error")

    refused(KeyError, "the user's own error", 1.0, loss_fn=fails)


def test_models_with_nothing_to_train() -> None:
    frozen = model_of_all_kinds().requires_grad_(False)
    refused(TraceError, "frozen", 1.0, model=frozen)
    refused(PlanError, "no parameters", 1.0, model=nn.Sequential(nn.Tanh()))


def test_models_that_are_no_module() -> None:
    for thing in (lambda x: x, None, "gpt2", nn.Linear):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            actckpt.optimize(thing, 1.0)  # type: ignore[type-var]


def test_models_on_several_devices() -> None:
    model = model_of_all_kinds()
    model.get_submodule("blocks.2").to("meta")
    with pytest.raises(PlanError, match="several devices"):
        actckpt.optimize(model, 1.0, batch=rows())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_models_in_the_middle_of_another_plan() -> None:
    whole = Chain(chain(3)(), Residual())
    inner = whole.get_submodule("blocks.0")
    actckpt.optimize(inner, None, policy="full", batch=rows(), loss_fn=scalar_loss)
    with pytest.raises(PlanError, match=r"blocks\.0.*another plan"):
        actckpt.optimize(whole, 1.0, batch=rows(), loss_fn=scalar_loss)
    assert "forward" not in whole.__dict__
    actckpt.report(inner)
    actckpt.revert(inner)
    actckpt.optimize(whole, None, policy="full", batch=rows(), loss_fn=scalar_loss)
    with pytest.raises(PlanError, match="another plan"):
        actckpt.optimize(inner, 1.0, batch=rows(), loss_fn=scalar_loss)
    with pytest.raises(PlanError, match="not optimized"):
        actckpt.report(inner)


def test_planning_while_a_planned_forward_runs() -> None:
    class Replans(nn.Module):
        model: list[nn.Module]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.model:
                actckpt.optimize(self.model[0], 1.0, batch=rows(), loss_fn=scalar_loss)
            return x.sin()

    replans = Replans()
    replans.model = []
    model = Chain(Residual(), replans)
    actckpt.optimize(
        model, None, batch=rows(), loss_fn=scalar_loss, policy=lambda g, p, b: plan("blocks.0")
    )
    replans.model = [model]
    with pytest.raises(PlanError, match="while a planned forward"):
        model(rows())
    replans.model = []
    scalar_loss(model(rows())).backward()


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ("fastest", "no policy 'fastest'; there are"),
        (3, "callable"),
        (None, "callable"),
        (lambda g, p, b: None, r"must return an actckpt\.Plan"),
        (lambda g, p, b: [], r"must return an actckpt\.Plan"),
        (lambda g, p, b: plan("nowhere"), "nowhere"),
        (lambda g, p, b: plan(region(("blocks.0", 1))), r"blocks\.0"),
        (lambda g, p, b: plan(region("blocks.2", "blocks.0")), "in order"),
        (lambda g, p, b: plan(region("blocks.0", "blocks.2.norm")), "same parent"),
        (lambda g, p, b: plan("blocks.0", "blocks.0"), "overlaps"),
        (lambda g, p, b: plan(region("blocks.0", "blocks.1"), "blocks.1"), "overlaps"),
        (lambda g, p, b: plan("blocks.2", "blocks.0"), "order|overlaps"),
        (lambda g, p, b: plan(region("blocks.0", None, region("blocks.2"))), "not inside"),
        (
            lambda g, p, b: plan(
                region("blocks.0", "blocks.2", region("blocks.0", "blocks.1"), region("blocks.1"))
            ),
            "overlaps",
        ),
        (
            lambda g, p, b: plan(
                Region(
                    ("blocks.0", 0), ("blocks.0", 0), (), (SavedOp("blocks.0", 0, "aten.no", 0),)
                )
            ),
            "no call 0 of aten.no",
        ),
        (
            lambda g, p, b: plan(
                Region(
                    ("blocks.0", 0),
                    ("blocks.0", 0),
                    (),
                    (SavedOp("blocks.0.linear", 0, "aten.addmm.default", 7),),
                )
            ),
            "no call 7",
        ),
    ],
)
def test_policies_that_return_no_plan_for_this_model(policy: Any, match: str) -> None:
    refused(PlanError, match, 1.0, policy=policy)
    if callable(policy):
        refused(PlanError, match, None, policy=policy)


def test_a_policy_that_returns_an_over_budget_plan() -> None:
    def stubborn(graph: Any, profile: Any, budget: int | None) -> Plan:
        return Plan("stubborn")

    error = refused(BudgetError, "stubborn", 1e-6, policy=stubborn, batch=rows(64))
    assert error.smallest_bytes > 1000


def test_a_policy_that_raises() -> None:
    def fails(graph: Any, profile: Any, budget: int | None) -> Plan:
        raise ZeroDivisionError("the policy's own error")

    refused(ZeroDivisionError, "the policy's own error", 1.0, policy=fails)


def test_scopes_that_are_none() -> None:
    refused(PlanError, "no scope 'all'", 1.0, scope="all")


def test_a_number_that_depends_on_data() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x.repeat(40, 1))
            return y * y.sum().item()

    model = Chain(Residual(), Scaled())
    error = refused(TraceError, r"(?s)blocks\.1.*y\.sum\(\)\.item\(\)", 1.0, model=model)
    assert "test_bad_input.py" in str(error)


@pytest.mark.parametrize("when", ["forward", "loss"])
def test_failures_while_tracing(when: str) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(3)
            random.random()
            np.random.rand()
            self.trace = x  # a fake tensor, if it stayed
            raise OSError("in the model")

    if when == "forward":
        error = refused(OSError, "in the model", 1.0, model=Chain(Residual(), Fails()))
        assert any("blocks.1" in note for note in error.__notes__)
    else:

        def loss(out: torch.Tensor) -> torch.Tensor:
            random.random()
            raise OSError("in the loss")

        refused(OSError, "in the loss", 1.0, loss_fn=loss)


def returns_none(*_: Any) -> Any:
    return None


def test_an_error_leaves_an_earlier_plan_in_force() -> None:
    model = seeded(chain(3, 0.1))()
    actckpt.optimize(
        model, None, batch=rows(), loss_fn=scalar_loss, policy=lambda g, p, b: plan("blocks.1")
    )
    before = actckpt.report(model).plan
    rewrite = installed(model)
    for budget, more in (
        (-1.0, {}),
        (1e-9, {"batch": rows(), "loss_fn": scalar_loss}),
        (1.0, {"batch": torch.zeros(2, 3)}),
        (1.0, {"batch": rows(), "policy": returns_none}),
    ):
        arguments: dict[str, Any] = {**more}
        with pytest.raises((BudgetError, RuntimeError, PlanError)):
            actckpt.optimize(model, budget, **arguments)
        assert installed(model) is rewrite
        assert actckpt.report(model).plan is before
    assert not differences(outcome(seeded(chain(3, 0.1))(), rows()), outcome(model, rows()))


def test_a_budget_error_on_the_first_forward_leaves_the_model_as_it_was() -> None:
    model = seeded(chain(3, 0.1))()
    with unchanged(model):
        actckpt.optimize(model, 1e-9, loss_fn=scalar_loss)
        with pytest.raises(BudgetError):
            model(rows(64))
    assert not any("forward" in m.__dict__ for m in model.modules())
    with pytest.raises(PlanError, match="not optimized"):
        actckpt.report(model)
    model.zero_grad()
    assert not differences(outcome(seeded(chain(3, 0.1))(), rows()), outcome(model, rows()))


def test_reports_before_there_is_one() -> None:
    model = chain(3)()
    with pytest.raises(PlanError, match=r"actckpt\.optimize"):
        actckpt.report(model)
    actckpt.optimize(model, 1.0)
    with pytest.raises(PlanError, match="first forward"):
        actckpt.report(model)


def test_measure_with_no_steps() -> None:
    model = chain(2)()
    for steps in (0, -1):
        with unchanged(model), pytest.raises(ValueError, match="at least 1"):
            actckpt.measure(model, rows(), loss_fn=scalar_loss, steps=steps)


class Mutating(nn.Module):
    """Grows a cache that it reads: what it does depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.box: Callable[[], float] = _Counter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (self.linear(x) * self.box()).exp()
        return y.sin()


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1.0 / self.calls


def test_a_forward_that_is_another_in_the_replay() -> None:
    model = Chain(Residual(), Mutating())
    actckpt.optimize(
        model, None, batch=rows(), loss_fn=scalar_loss, policy=lambda g, p, b: plan("blocks.1")
    )
    out = model(rows())
    with pytest.raises(ReplayError, match=r"blocks\.1") as caught:
        scalar_loss(out).backward()
    assert len(str(caught.value).splitlines()) <= 10
    actckpt.revert(model)
    scalar_loss(model(rows())).backward()


@pytest.mark.parametrize("policy", ["optimal", "calls", "auto"])
def test_a_budget_where_there_is_nothing_to_recompute(policy: str) -> None:
    class Penalized(nn.Linear):
        """Runs autograd itself, and cannot be recomputed."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            out = super().forward(x).tanh()
            (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss: torch.Tensor = out.mean() + grad.norm()
            return loss

    model, batch = Penalized(64, 64), torch.ones(32, 64)
    with pytest.raises(BudgetError, match="smallest plan"):
        actckpt.optimize(model, 1e-6, batch=batch, loss_fn=lambda out: out, policy=policy)
    assert "forward" not in model.__dict__
    model(batch).backward()
