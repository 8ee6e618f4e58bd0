"""Autocast: the casts of a replay, one weight used several times, backward inside the context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.data.plan import Plan
from actckpt.tracing.call import Call
from tests.burst_plans import everything
from tests.exact import assert_exact, halves, plan, region, saving, scalar_loss
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows


def bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def uncached() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def forward_inside(model: nn.Module, call: Call) -> Any:
    with bf16():
        output = model(*call.args, **call.kwargs)
        loss = scalar_loss(output)
    loss.backward()
    return output


def all_inside(model: nn.Module, call: Call) -> Any:
    with bf16():
        output = model(*call.args, **call.kwargs)
        scalar_loss(output).backward()
    return output


def backward_inside_another(model: nn.Module, call: Call) -> Any:
    output = model(*call.args, **call.kwargs)
    with bf16():
        scalar_loss(output).backward()
    return output


def uncached_forward(model: nn.Module, call: Call) -> Any:
    with uncached():
        output = model(*call.args, **call.kwargs)
        loss = scalar_loss(output)
    loss.backward()
    return output


class Thrice(nn.Module):
    """One weight used three times, cast once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.linear(x).tanh() + x
        return x


class Islands(nn.Module):
    """Switches autocast off, and to another dtype, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).sin()
        with torch.autocast("cpu", enabled=False):
            y = self.b(y.float()).exp()
        with torch.autocast("cpu", torch.float16):
            y = self.c(y)
        result: torch.Tensor = y.float().sigmoid()
        return result


def shared() -> nn.Module:
    """One linear layer in several blocks: cast in one region, used in the next."""
    model = Chain(Residual(p=0.1), Residual(p=0.1), Thrice())
    weight = model.blocks[0].get_parameter("linear.weight")
    for path in ("blocks.1.linear", "blocks.2.linear"):
        model.get_submodule(path).register_parameter("weight", weight)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain(3, 0.2),
    "weight used three times": lambda: Chain(Thrice(), Thrice(), Thrice()),
    "weight shared by blocks": shared,
    "islands": lambda: Chain(Islands(), Islands(), Residual()),
}
PLANS: dict[str, Plan] = {
    "each": plan("blocks.0", "blocks.1", "blocks.2"),
    "last": plan("blocks.2"),
    "span": plan(region("blocks.0", "blocks.2")),
    "tree": plan(halves("blocks", 0, 2)),
    "root": plan(region("", None, region("blocks.1"))),
}


@pytest.mark.parametrize("run", [forward_inside, all_inside])
@pytest.mark.parametrize("wanted", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_gradients_under_autocast(make: Callable[[], nn.Module], wanted: Plan, run: Any) -> None:
    assert_exact(make, rows, wanted, run=run, context=bf16)


@pytest.mark.parametrize("wanted", [PLANS["tree"], everything], ids=["calls", "operations"])
def test_backward_alone_inside_autocast(wanted: Any) -> None:
    assert_exact(chain(3), rows, wanted, run=backward_inside_another)


def test_autocast_without_its_cache() -> None:
    for make in MODELS.values():
        assert_exact(make, rows, PLANS["span"], run=uncached_forward, context=uncached)


def test_traced_without_autocast_and_run_under_it() -> None:
    for make in MODELS.values():
        assert_exact(make, rows, PLANS["tree"], run=forward_inside)


@pytest.mark.parametrize("name", ["weight used three times", "chain"])
def test_saved_operations_under_autocast(name: str) -> None:
    def wanted(g: Any) -> Plan:
        return plan(*(region(f"blocks.{i}", saved=saving(g, f"blocks.{i}", "aten.addmm"))
                      for i in range(3)))  # fmt: skip

    for run in (forward_inside, all_inside):
        assert_exact(MODELS[name], rows, wanted, run=run, context=bf16)
        assert_exact(MODELS[name], rows, wanted, run=run, context=bf16, prune=True)


def test_the_cache_is_left_as_it_was() -> None:
    """A cast made by a replay must not serve a later forward of the same context."""

    def two_forwards(model: nn.Module, call: Call) -> Any:
        with bf16():
            scalar_loss(model(*call.args)).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01)
            torch.clear_autocast_cache()
            output = model(*call.args)
            scalar_loss(output).backward()
        return output

    assert_exact(MODELS["weight used three times"], rows, PLANS["each"], run=two_forwards)
