"""Choices made better window by window: never slower, never above the budget, and better."""

from __future__ import annotations

import pytest

from actckpt.policies.solver.burst_choices import burst_choices
from actckpt.policies.solver.columns import Columns
from actckpt.policies.solver.neighbourhood import improved
from actckpt.policies.solver.packing import Choice, Packing
from tests.predictions import prepared

MODELS = ("gpt2", "bert", "unet", "t5", "resnet")


def halfway(packing: Packing, share: float) -> int:
    """A budget between the least that mixtures of choices need, and the untouched peak."""
    lowest = packing.relaxation().least_peak()
    assert lowest is not None
    return int(lowest.value + share * (int(packing.base.max()) - lowest.value))


def fastest(packing: Packing, budget_bytes: int) -> list[Choice]:
    picked = packing.fastest(budget_bytes)
    assert picked
    return picked


@pytest.mark.parametrize("name", MODELS)
def test_what_is_settled_is_chosen(name: str) -> None:
    p = prepared(name)
    packing = Packing(p.pricer, burst_choices(p.profile, p.pricer))
    budget = halfway(packing, 0.4)
    picked = fastest(packing, budget)
    settled = picked[::2]
    taken = frozenset(s for c in settled for s in c.takes)
    free = [c for c in packing.choices if not c.takes & taken]
    spare = Packing(p.pricer, [*settled, *free], settled=len(settled))
    again = fastest(spare, budget)
    assert {c.parts for c in settled} <= {c.parts for c in again}
    assert packing.estimate(again).peak_bytes <= budget
    # where there is room for everything nothing would be chosen, but for what is settled
    roomy = fastest(spare, 2 * int(packing.base.max()))
    assert {c.parts for c in roomy} == {c.parts for c in settled}
    # of the same choices: how long they may be held depends on which there are
    unsettled = Packing(p.pricer, spare.choices).relaxation().least_time(budget)
    relaxed = spare.relaxation().least_time(budget)
    assert relaxed is not None
    assert unsettled is not None
    assert relaxed.value >= unsettled.value * (1 - 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_choices_for_a_smaller_budget_become_faster(name: str) -> None:
    p = prepared(name)
    packing = Packing(p.pricer, burst_choices(p.profile, p.pricer))
    columns = Columns(p.pricer)
    start = fastest(packing, halfway(packing, 0.2))
    budget = halfway(packing, 0.6)
    better = improved(packing, columns, start, budget)
    assert packing.estimate(better).peak_bytes <= budget
    assert packing.estimate(better).time_s < packing.estimate(start).time_s
    takes = [s for c in better for s in c.takes]
    assert len(takes) == len(set(takes))
    # the best that is known is not made worse
    known = fastest(packing, budget)
    kept = improved(packing, columns, known, budget)
    assert packing.estimate(kept).peak_bytes <= budget
    assert packing.estimate(kept).time_s <= packing.estimate(known).time_s
