"""`torch.compile` on planned models, before and after, whole and in part: exact, and said."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import PlanError
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = [
    pytest.mark.usefixtures("flat_profile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # Dynamo's own
]
make = seeded(chain(3, 0.1))
BATCH = rows(64)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))


def compiled(model: nn.Module, how: str) -> Any:
    """What the loop calls."""
    if how == "torch.compile":
        return torch.compile(model, backend="aot_eager")
    if how == "compile()":
        model.compile(backend="aot_eager")
    if how == "a step":

        @torch.compile(backend="aot_eager")
        def step(x: torch.Tensor) -> Any:
            return model(x)

        return step
    blocks: Any = model.get_submodule("blocks")
    for n, block in enumerate(blocks if how in ("blocks", "wrapped blocks") else ()):
        if how == "blocks":
            block.compile(backend="aot_eager")
        else:
            blocks[n] = torch.compile(block, backend="aot_eager")
    return model


def train(model: nn.Module, called: Any, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        scalar_loss(called(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@functools.cache
def budget_gb() -> float:
    return 0.75e-9 * actckpt.measure(make(), BATCH, loss_fn=scalar_loss, steps=1).added_bytes


def planned(model: nn.Module, given: torch.Tensor | None) -> nn.Module:
    return actckpt.optimize(
        model, budget_gb(), scope="activations", loss_fn=scalar_loss, batch=given
    )


def within(model: nn.Module) -> bool:
    added = actckpt.measure(model, BATCH, loss_fn=scalar_loss, steps=1).added_bytes
    return added <= 1e9 * budget_gb()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r for r in caplog.records if r.name == "actckpt" and r.levelno >= logging.WARNING]
    return [r.message for r in found]


@pytest.mark.kind("torch.compile on an optimized model", bits=True, peak="within")
@pytest.mark.parametrize(("how", "given"), [("torch.compile", None), ("compile()", BATCH)])
def test_compiled_after_it_was_optimized(
    how: str, given: torch.Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    untouched = make()
    expected = train(untouched, untouched)
    model = planned(make(), given)
    assert same(expected, train(model, compiled(model, how)))
    assert not graphs()
    (told,) = said(caplog)
    assert "is compiled, and what is planned runs eagerly" in told
    assert within(model)


def test_a_compiled_function_that_calls_the_model(caplog: pytest.LogCaptureFixture) -> None:
    untouched = make()
    expected = train(untouched, untouched)
    model = planned(make(), None)
    assert same(expected, train(model, compiled(model, "a step")))
    assert graphs() <= 1
    assert len(said(caplog)) == 1
    assert within(model)


def test_compiled_before_it_is_optimized(caplog: pytest.LogCaptureFixture) -> None:
    untouched = make()
    expected = train(untouched, untouched)
    model = make()
    compiled(model, "compile()")
    planned(model, None)
    (told,) = said(caplog)  # at the call
    assert "is compiled" in told
    assert same(expected, train(model, model))
    assert not graphs()
    assert len(said(caplog)) == 1
    with pytest.raises(PlanError, match=r"torch\.compile has made of a model.*_orig_mod"):
        actckpt.optimize(compiled(make(), "torch.compile"), 1.0)


def test_reverted_it_is_compiled() -> None:
    model = planned(make(), BATCH)
    called = compiled(model, "torch.compile")
    train(model, called, steps=1)
    actckpt.revert(model)
    train(model, called, steps=1)
    assert graphs()


@pytest.mark.kind("compiled modules inside an optimized model", bits=True, peak="within")
@pytest.mark.parametrize("how", ["blocks", "wrapped blocks"])
def test_compiled_modules_inside(how: str, caplog: pytest.LogCaptureFixture) -> None:
    untouched = make()
    expected = train(untouched, compiled(untouched, how))
    assert graphs()
    model = make()
    compiled(model, how)
    budget = 1.2 * budget_gb()
    actckpt.optimize(model, budget, scope="activations", loss_fn=scalar_loss)
    assert same(expected, train(model, model))
    (told,) = said(caplog)
    assert "3 modules inside the Chain are compiled" in told
    assert actckpt.report(model).plan.regions
    measured = actckpt.measure(model, BATCH, loss_fn=scalar_loss, steps=1)
    assert measured.added_bytes <= 1e9 * budget
