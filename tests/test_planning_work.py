"""How often a training is traced, profiled and searched for until its second optimizer step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.planning import making, request, search, traced
from actckpt.session.session import session_of
from tests.exact import differences, scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")

STEPS = 2
# of the untouched step of 48 rows without an optimizer
BUDGET = 0.7


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What planning does, counted."""
    done: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return original(*args, **kwargs)

        return call

    does: dict[str, Any] = {"trace_step": traced, "build_profile": making, "dry_run": search}
    for name, module in does.items():
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    policies = {n: counted("searches", p) for n, p in actckpt.POLICIES.items()}
    monkeypatch.setattr(request, "POLICIES", policies)
    return done


def budget_gb(count: int = 48) -> float:
    whole = actckpt.measure(seeded(chain(6, 0.1))(), rows(count), loss_fn=scalar_loss, steps=1)
    return BUDGET * whole.peak_bytes / 1e9


def trained(
    lengths: list[int],
    *,
    micro_steps: int = 1,
    budget: float | None = None,
    before: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
    late: bool = False,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model trained by a plain loop, and its weights.

    Args:
        lengths: of the batches, one for each backward.
        before: what else is done before the loop, in place of a lazy `actckpt.optimize`.
        late: the optimizer is made after that.
    """
    model = seeded(chain(6, 0.1))()

    def make() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    optimizer = None if late else make()
    if before is not None:
        before(model, optimizer)  # type: ignore[arg-type]
    elif budget is not None:
        actckpt.optimize(model, budget, loss_fn=scalar_loss)
    optimizer = optimizer or make()
    torch.manual_seed(5)
    for n, count in enumerate(lengths, start=1):
        scalar_loss(model(rows(count))).backward()
        if n % micro_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_an_optimizer_that_exists_is_planned_with(work: Counter[str]) -> None:
    _, expected = trained([48] * STEPS)
    model, found = trained([48] * STEPS, budget=budget_gb())
    assert not differences(expected, found)
    assert actckpt.report(model).plan.bursts
    assert work == {"trace_step": 1, "build_profile": 1, "searches": 1, "dry_run": 1}
    graph = session_of(model).current.planned.graph  # type: ignore[union-attr]
    assert graph.optimizer_seen


def test_accumulated_gradients_are_planned_for_once(work: Counter[str]) -> None:
    _, expected = trained([48] * 6, micro_steps=3)
    model, found = trained([48] * 6, micro_steps=3, budget=budget_gb())
    assert not differences(expected, found)
    assert actckpt.report(model).plan.bursts
    assert work["trace_step"] <= 2
    assert work["searches"] <= 2


def test_accelerate_says_that_gradients_will_be_there(
    work: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import GradientState

    monkeypatch.setitem(GradientState._shared_state, "sync_gradients", False)
    model, _ = trained([48] * 6, micro_steps=3, budget=budget_gb())
    assert work["trace_step"] == work["searches"] == 1
    assert session_of(model).current.planned.graph.resident_gradients  # type: ignore[union-attr]


def test_a_loose_budget_holds_with_gradients_too(work: Counter[str]) -> None:
    model, _ = trained([48] * 6, micro_steps=3, budget=1.0)
    assert work["trace_step"] == work["searches"] == 1
    assert not actckpt.report(model).plan.bursts


@pytest.mark.parametrize("late", [False, True], ids=["optimizer before", "optimizer after"])
def test_the_longest_batch_is_planned_for_and_covers_the_shorter_ones(
    work: Counter[str], late: bool
) -> None:
    lengths = [30, 41, 17, 48, 29, 48]
    _, expected = trained(lengths)
    # room enough for a plan by calls of the longest
    budget = 1.25 * budget_gb()

    def before(model: nn.Module, _: Any) -> None:
        actckpt.optimize(model, budget, batch=rows(48), loss_fn=scalar_loss)

    model, found = trained(lengths, before=before, late=late)
    assert not differences(expected, found)
    # by operations for 48 rows; by calls for 48 rows, as others come
    assert work["build_profile"] <= 2 + late
    assert work["trace_step"] <= 1 + late
    session = session_of(model)
    assert session is not None
    assert {e.key.shapes for e in session.entries} == {((48, 8),)}
    assert session.current is not None
    assert session.current.planned.graph.optimizer_seen
