"""What stands round a planned model's forward is not run again while its first step plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Category
from actckpt.session.session import session_of
from tests.exact import differences, outcome, scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")
make = seeded(chain(4, 0.1))


def autocast_states() -> tuple[Any, ...]:
    """What a user's next operation would find."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    before = autocast_states()
    yield
    after = autocast_states()
    torch.set_autocast_enabled("cpu", before[0])  # for the tests that follow
    assert after == before


def by_accelerate(model: nn.Module) -> nn.Module:
    """As `accelerator.prepare` and Hugging Face's Trainer leave a model."""
    accelerate = pytest.importorskip("accelerate")
    prepared: nn.Module = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    return prepared


def by_decorator(model: nn.Module) -> nn.Module:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


class Wide(nn.Module):
    """Its outputs are most of its memory, and what a copy of them in float32 takes shows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = chain(4)()
        self.head = nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks(x))
        return out


@pytest.mark.kind("planned beneath a trainer's autocast", bits=True, peak="within")
@pytest.mark.parametrize("prepare", [by_accelerate, by_decorator])
def test_the_first_forward_under_a_wrapper_leaves_autocast_as_it_was(
    prepare: Callable[[nn.Module], nn.Module],
) -> None:
    untouched, batch = prepare(seeded(Wide)()), rows(256)
    expected = outcome(untouched, batch)
    most = actckpt.measure(untouched, batch, loss_fn=scalar_loss, steps=1).added_bytes
    budget_gb = 0.9 * most / 1e9
    model = actckpt.optimize(seeded(Wide)(), budget_gb, scope="activations", loss_fn=scalar_loss)
    model = prepare(model)
    found = outcome(model, batch)
    assert not torch.is_autocast_enabled("cpu")
    assert not differences(expected, found)
    plan = actckpt.report(model).plan
    assert plan.regions or plan.bursts
    measured = actckpt.measure(model, batch, loss_fn=scalar_loss, steps=1).added_bytes
    assert measured <= budget_gb * 1e9


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "trace": lambda m: actckpt.trace(m, rows(64), loss_fn=scalar_loss),
    "measure": lambda m: actckpt.measure(m, rows(64), loss_fn=scalar_loss, steps=1),
    "optimize": lambda m: actckpt.optimize(m, 1.0, batch=rows(64), loss_fn=scalar_loss),
    "find_max_batch": lambda m: actckpt.find_max_batch(
        m, 1.0, lambda n: rows(n), loss_fn=scalar_loss, limit=2
    ),
    "report": lambda m: (m(rows(64)), actckpt.report(m)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", [True, False], ids=["optimized before", "prepared before"])
def test_no_public_call_on_a_prepared_model_leaves_autocast_on(call: str, before: bool) -> None:
    model = make()
    if before:
        model = by_decorator(actckpt.optimize(model, 1.0))
    else:
        model = actckpt.optimize(by_decorator(model), 1.0)
    CALLS[call](model)
    assert not torch.is_autocast_enabled("cpu")
    scalar_loss(model(rows(64))).backward()


def test_hooks_before_the_forward_change_its_arguments_once() -> None:
    def widened(model: nn.Module) -> nn.Module:
        pad = nn.functional.pad
        model.register_forward_pre_hook(lambda _, args: (pad(args[0], (0, 4)),))
        return model

    expected = outcome(widened(make()), rows(32, 4))
    model = widened(actckpt.optimize(make(), None, policy="full", loss_fn=scalar_loss))
    assert not differences(expected, outcome(model, rows(32, 4)))
    assert actckpt.report(model).plan.regions
    assert planned_batch(model) == [rows(32).nbytes]


def planned_batch(model: nn.Module) -> list[int]:
    """Bytes of the tensors that the plan in force takes for the batch."""
    session = session_of(model)
    assert session is not None
    assert session.current is not None
    storages = session.current.planned.graph.storages
    return [s.bytes for s in storages if s.category is Category.BATCH]


def test_what_an_unknown_wrapper_does_is_said_not_to_be_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            calls.append(1)
            return forward(*args)

        return counting

    calls: list[int] = []
    model = actckpt.optimize(make(), None, policy="full", loss_fn=scalar_loss)
    model.forward = counted(model.forward)
    expected = outcome(make(), rows(32), steps=3)
    assert not differences(expected, outcome(model, rows(32), steps=3))
    assert len(calls) == 3  # as often as the loop calls it, though planned twice
    said = [r.message for r in caplog.records if "counting" in r.message]
    assert len(said) == 1
    assert "is not counted" in said[0]
