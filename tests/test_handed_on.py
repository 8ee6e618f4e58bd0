"""A search that begins with the ways of an earlier one: less work, a plan that is no worse."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import actckpt
from actckpt.data.plan import Plan
from actckpt.planning import making
from actckpt.policies.solver.handed_on import handing_on
from actckpt.policies.solver.leveled_choices import LeveledChoices
from actckpt.policies.solver.staged import StagedSegment
from actckpt.pricing.simulate import Pricer
from actckpt.session.session import session_of
from tests.exact import differences, scalar_loss
from tests.models.blocks import chain, rows
from tests.predictions import prepared
from tests.suite import seeded

# of a step's time: what a search among given ways may miss
CLOSE = 5e-3


@pytest.fixture
def solved() -> Iterator[Counter[str]]:
    """What searches by operations make: plans with levels, and programs of segments."""
    made: Counter[str] = Counter()
    levels, stages = LeveledChoices.__init__, StagedSegment.solver

    def with_levels(*args: object, **kwargs: object) -> None:
        made["levels"] += 1
        levels(*args, **kwargs)  # type: ignore[arg-type]

    def of_segment(*args: object, **kwargs: object) -> object:
        made["segments"] += 1
        return stages(*args, **kwargs)  # type: ignore[arg-type]

    with (
        patch.object(LeveledChoices, "__init__", with_levels),
        patch.object(StagedSegment, "solver", of_segment),
    ):
        yield made


def test_a_search_with_ways_at_hand_does_less_and_its_plan_is_no_worse(
    solved: Counter[str],
) -> None:
    p = prepared("gpt2")
    # drawn, not measured: how long a search is depends on what operations cost
    drawn = random.Random("drawn2")
    costs = tuple(replace(c, time_s=drawn.uniform(20, 400) * 1e-6) for c in p.profile.costs)
    profile = replace(p.profile, costs=costs)
    pricer = Pricer(p.graph, profile)
    whole = pricer.estimate(Plan(""))
    budget, larger = (int(share * whole.peak_bytes) for share in (0.75, 0.8))

    def searched(budget_bytes: int, given: tuple[tuple[actckpt.Burst, ...], ...] = ()) -> float:
        solved.clear()
        with handing_on(given) as handed:
            plan = actckpt.POLICIES["optimal"](p.graph, profile, budget_bytes)
        left.append(handed.left)
        price = pricer.price(plan)
        assert price.peak_bytes <= budget_bytes
        return price.time_s

    left: list[tuple[tuple[actckpt.Burst, ...], ...]] = []
    searched(larger)
    assert left[0]
    alone_s, alone = searched(budget), Counter(solved)
    begun_s, begun = searched(budget, left[0]), Counter(solved)
    assert begun_s <= alone_s + CLOSE * whole.time_s
    assert sum(begun.values()) < sum(alone.values())


def test_ways_that_fit_no_more_are_left_alone() -> None:
    p = prepared("gpt2")
    whole = p.pricer.estimate(Plan("")).peak_bytes
    with handing_on() as handed:
        actckpt.POLICIES["optimal"](p.graph, p.profile, int(0.85 * whole))
    few = handed.left[:1]
    plans = []
    for given in ((), few):
        with handing_on(given):
            plans.append(actckpt.POLICIES["optimal"](p.graph, p.profile, int(0.75 * whole)))
    assert plans[0] == plans[1]


@pytest.mark.usefixtures("flat_profile")
def test_the_plan_for_gradients_that_stay_begins_with_the_first_ones_ways() -> None:
    def trained(budget_gb: float | None) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        model = seeded(chain(6, 0.1))()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if budget_gb is not None:
            actckpt.optimize(model, budget_gb, loss_fn=scalar_loss)
        torch.manual_seed(5)
        for n in range(4):
            scalar_loss(model(rows(48))).backward()
            if n % 2:
                optimizer.step()
                optimizer.zero_grad()
        return model, {n: p.detach().clone() for n, p in model.named_parameters()}

    whole = actckpt.measure(seeded(chain(6, 0.1))(), rows(48), loss_fn=scalar_loss, steps=1)
    _, expected = trained(None)
    with patch.object(making, "handing_on", side_effect=handing_on) as begun:
        model, found = trained(0.7 * whole.peak_bytes / 1e9)
    assert not differences(expected, found)
    session = session_of(model)
    assert session is not None
    first, second = (entry.planned for entry in session.entries)
    assert first.plan.bursts
    assert second.plan.bursts
    assert not first.graph.resident_gradients
    assert second.graph.resident_gradients
    assert first.ways
    assert [call.args for call in begun.call_args_list] == [((),), (first.ways,)]
