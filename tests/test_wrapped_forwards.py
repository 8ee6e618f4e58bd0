"""A trainer wraps the forward of a planned model: the plan stays in force under the wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial, wraps
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.rewriting.installing import installed
from actckpt.tracing.forwards import TAKEN, replaced
from tests.exact import Body, differences, outcome, scalar_loss, watched
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")

Forward = Callable[..., Any]


def cast(forward: Forward) -> Forward:
    """Runs a forward under autocast and returns float32, as mixed-precision trainers do."""

    @wraps(forward, assigned=())
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(*args, **kwargs)
        return out.float()

    return under_autocast


class Caller:
    """A callable that keeps what it calls in an attribute."""

    def __init__(self, forward: Forward) -> None:
        self.inner = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def closure(module: nn.Module) -> None:
    module.forward = cast(module.forward)


def bound_again(module: nn.Module) -> None:
    """As Accelerate does where a forward has a function."""
    function = getattr(module.forward, "__func__", None)
    module.forward = (
        cast(module.forward) if function is None else MethodType(cast(function), module)
    )


def attribute(module: nn.Module) -> None:
    module.forward = Caller(cast(module.forward))


def in_part(module: nn.Module) -> None:
    module.forward = partial(cast(module.forward))


def beside(module: nn.Module) -> None:
    """The wrapper finds what it wraps on the module."""
    module.__dict__["_old_forward"] = module.forward
    module.forward = cast(lambda *args: module.__dict__["_old_forward"](*args))


WRAPS = {f.__name__: f for f in (closure, bound_again, attribute, in_part, beside)}
each_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
make = chain(6, 0.1)


def trained() -> Body:
    """Steps of an optimizer, which becomes known after the first."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def run(model: nn.Module, call: Any) -> Any:
        optimizer = optimizers.get(id(model))
        if optimizer is None:
            optimizer = optimizers[id(model)] = torch.optim.Adam(model.parameters())
        out = model(*call.args)
        scalar_loss(out).backward()
        optimizer.step()
        return out

    return run


def steps_of(model: nn.Module, count: int = 3) -> dict[str, torch.Tensor]:
    return outcome(model, rows(64), trained(), steps=count)


@cache
def expected(wrap: Callable[[nn.Module], None]) -> dict[str, torch.Tensor]:
    model = seeded(make)()
    wrap(model)
    return steps_of(model)


@cache
def budget_gb() -> float:
    """What a plan by operations must do something for."""
    with pytest.raises(actckpt.BudgetError) as caught:
        actckpt.optimize(seeded(make)(), 1e-9, batch=rows(64), loss_fn=scalar_loss)
    return 1.3 * (caught.value.smallest_bytes or 0) / 1e9


@each_wrap
@pytest.mark.parametrize("batch", [None, rows(64)], ids=["in the first step", "at once"])
@pytest.mark.parametrize("policy", ["auto", "full"])
def test_a_plan_made_before_and_anew_under_the_wrapper(
    wrap: Callable[[nn.Module], None], batch: torch.Tensor | None, policy: str
) -> None:
    model = seeded(make)()
    budget = budget_gb() if policy == "auto" else None
    actckpt.optimize(model, budget, batch=batch, policy=policy, loss_fn=scalar_loss)
    wrap(model)
    assert not differences(expected(wrap), steps_of(model))
    plan = actckpt.report(model).plan
    assert plan.regions or plan.bursts
    with watched() as seen:  # by the plan that was made last
        steps_of(model, 1)
    assert seen.replays or policy != "full"
    ours = replaced(model)
    assert ours is not None
    assert ours.instead is None


@each_wrap
def test_a_plan_under_a_wrapper_replays_and_reverts(wrap: Callable[[nn.Module], None]) -> None:
    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    wrap(model)
    with watched() as seen:
        assert not differences(expected(wrap), steps_of(model))
    assert seen.replays
    wrapper = model.__dict__["forward"]
    actckpt.revert(model)
    assert installed(model) is None
    assert model.__dict__["forward"] is wrapper
    model.load_state_dict(seeded(make)().state_dict())
    with watched() as seen:
        assert not differences(expected(wrap), steps_of(model))
        outcome(model, rows(128), steps=1)  # what is off plans nothing, for a larger batch either
    assert not seen.replays
    assert installed(model) is None
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    model.load_state_dict(seeded(make)().state_dict())
    with watched() as seen:
        assert not differences(expected(wrap), steps_of(model))
    assert seen.replays


def test_a_copy_runs_its_own_weights_under_a_wrapper_that_is_bound_again() -> None:
    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    bound_again(model)
    steps_of(model, 1)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    plain = seeded(make)()
    plain.load_state_dict(clone.state_dict())
    bound_again(plain)
    with watched() as seen:
        assert not differences(steps_of(plain), steps_of(clone))
    assert seen.replays


@each_wrap
def test_a_wrapped_module_inside(wrap: Callable[[nn.Module], None]) -> None:
    def inside(model: nn.Module) -> None:
        wrap(model.get_submodule("blocks.2"))

    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    inside(model)
    with watched() as seen:
        assert not differences(expected(inside), steps_of(model))
    assert any("blocks.2" in label for label in seen.labels)


def test_a_forward_that_takes_the_place_of_ours_is_the_models_own() -> None:
    def replace(model: nn.Module) -> None:
        blocks = list(model.get_submodule("blocks").children())
        model.forward = lambda x: blocks[0](x) + blocks[1](x)

    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    replace(model)
    assert not differences(expected(replace), steps_of(model))
    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    replace(model)
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    with watched() as seen:
        assert not differences(expected(replace), steps_of(model))
    assert set(seen.labels) <= {"blocks.0", "blocks.1"}


def test_nothing_is_left_of_a_function_that_was_taken() -> None:
    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(64), loss_fn=scalar_loss, policy="full")
    assert hasattr(model.forward, "__func__")
    assert TAKEN in model.__dict__
    actckpt.revert(model)
    assert TAKEN not in model.__dict__
    assert "forward" not in model.__dict__
