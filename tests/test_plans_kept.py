"""Plans that outlive what is learned later: kept where they still fit, made anew where not.

And optimizers that exist: planned with before they step, or without where nothing else fits.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.planning import request
from actckpt.session.session import session_of
from tests.exact import differences, scalar_loss
from tests.models.blocks import chain, rows
from tests.models.mlp import MLP
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")

NOT_SEEN = "no optimizer was seen"
Make = Callable[[nn.Module], torch.optim.Optimizer]


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    done: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return actckpt.POLICIES[name](*args, **kwargs)

        return call

    monkeypatch.setattr(request, "POLICIES", {n: counted(n) for n in actckpt.POLICIES})
    return done


def smallest_gb(model: nn.Module, batch: torch.Tensor, **given: Any) -> float:
    """The least budget that some plan fits."""
    with pytest.raises(actckpt.BudgetError) as found:
        actckpt.optimize(model, 1e-6, batch=batch, loss_fn=scalar_loss, **given)
    assert found.value.smallest_bytes is not None
    return found.value.smallest_bytes / 1e9


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> dict[str, Any]:
    torch.manual_seed(5)
    for _ in range(count):
        scalar_loss(model(rows(48))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---- plans


def planned_first(make: Make, budget_gb: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model planned without an optimizer, which is made then."""
    model = seeded(chain(6, 0.1))()
    actckpt.optimize(model, budget_gb, batch=rows(48), loss_fn=scalar_loss, policy="calls")
    return model, make(model)


def budget_of_chain(share: float) -> float:
    whole = actckpt.measure(seeded(chain(6, 0.1))(), rows(48), loss_fn=scalar_loss, steps=1)
    return share * whole.peak_bytes / 1e9


def test_a_plan_that_still_fits_is_kept_without_a_search(searches: Counter[str]) -> None:
    budget = budget_of_chain(0.85)
    untouched = seeded(chain(6, 0.1))()
    expected = steps(untouched, plain(untouched))
    model, optimizer = planned_first(plain, budget)
    before = actckpt.report(model).plan
    assert before.regions
    assert not differences(expected, steps(model, optimizer))
    session = session_of(model)
    assert session is not None
    assert session.current is not None
    # planned for the step as it is now, by the plan as it was
    assert session.current.planned.graph.optimizer_seen
    assert len(session.entries) == 2
    assert actckpt.report(model).plan == before
    assert searches == {"calls": 1}


def test_a_plan_that_no_longer_fits_is_made_anew(searches: Counter[str]) -> None:
    budget = budget_of_chain(0.78)
    untouched = seeded(chain(6, 0.1))()
    expected = steps(untouched, momentum(untouched))
    model, optimizer = planned_first(momentum, budget)
    before = actckpt.report(model)
    assert not differences(expected, steps(model, optimizer))
    after = actckpt.report(model)
    assert after.plan != before.plan
    assert after.planned.predicted.peak_bytes <= budget * 1e9
    assert searches["calls"] > 1


def test_a_policy_that_does_not_answer_with_the_fastest_is_asked_again(
    searches: Counter[str],
) -> None:
    model = seeded(chain(6, 0.1))()
    actckpt.optimize(model, 1.0, batch=rows(48), loss_fn=scalar_loss, policy="sqrt")
    steps(model, plain(model))
    assert searches == {"sqrt": 2}


# ---- optimizers that exist


def wide() -> nn.Module:
    """Weights that AdamW's state outweighs activations with."""
    return seeded(lambda: MLP(4, 64))()


BATCH = torch.ones(4, 64)


def between() -> float:
    """A budget that nothing fits with AdamW, and something without it."""
    model = wide()
    without = smallest_gb(model, BATCH)
    beside = smallest_gb(model, BATCH, optimizer=torch.optim.AdamW(model.parameters()))
    assert 1.2 * without < beside
    return (without + beside) / 2


def test_an_optimizer_with_which_nothing_fits_is_declined_until_it_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = between()
    model = wide()
    adamw = torch.optim.AdamW(model.parameters())
    actckpt.optimize(model, budget)
    with caplog.at_level(logging.WARNING, "actckpt"):
        for count in (4, 3):  # another batch does not ask for it again
            scalar_loss(model(torch.ones(count, 64))).backward()
            model.zero_grad()
    told = [r.getMessage() for r in caplog.records if "nothing fits" in r.getMessage()]
    assert len(told) == 1
    assert "with AdamW, which exists and has not stepped yet" in told[0]
    report = actckpt.report(model)
    assert NOT_SEEN in " ".join(report.notes)
    scalar_loss(model(BATCH)).backward()
    adamw.step()
    adamw.zero_grad()
    with pytest.raises(actckpt.BudgetError, match="optimizer"):
        model(BATCH)


def test_one_that_steps_in_its_place_is_planned_with(caplog: pytest.LogCaptureFixture) -> None:
    budget = between()
    untouched, model = wide(), wide()
    _left_over = torch.optim.AdamW(model.parameters())
    actckpt.optimize(model, budget, loss_fn=scalar_loss)

    def trained(model: nn.Module) -> dict[str, Any]:
        optimizer = plain(model)
        for _ in range(3):
            scalar_loss(model(BATCH)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    assert not differences(trained(untouched), trained(model))
    report = actckpt.report(model)
    assert NOT_SEEN not in " ".join(report.notes)
    assert report.planned.predicted.peak_bytes <= budget * 1e9
