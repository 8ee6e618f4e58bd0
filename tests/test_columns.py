"""Choices made at prices of memory: as good as any that is known, and what a packing asks for."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import actckpt
from actckpt.policies.solver.burst_choices import FOLLOWED, burst_choices, priced
from actckpt.policies.solver.columns import Columns
from actckpt.policies.solver.packing import Choice, Packing, plan_of
from actckpt.policies.solver.staged import StagedSegment
from actckpt.pricing.simulate import Pricer
from experiments.optimality import caught
from tests.exact import scalar_loss
from tests.models.blocks import Chain, rows
from tests.predictions import prepared

MODELS = ("gpt2", "bert", "densenet", "unet", "t5", "mixtral")
# the gap of the small programs; besides, they do not see what a burst as such costs
CLOSE = 0.02


def worth_s(
    pricer: Pricer, choice: Choice, segment: tuple[int, int], prices: Mapping[int, float]
) -> float:
    """Seconds of a choice with what its bytes cost; what it reads of others is not its own.

    Without what following it costs, which the small programs do not know.
    """
    level = choice.delta.whole().astype(float)
    for hold in choice.holds:
        own = hold.storage in choice.takes
        if own if hold.saved else pricer.born[hold.storage] >= segment[0]:
            hold.added_to(level)
    following_s = pricer.estimate(plan_of([choice])).following_s * FOLLOWED
    paid_s = float(sum(price * level[at] for at, price in prices.items()))
    return choice.time_s - following_s + paid_s


@pytest.mark.parametrize("name", MODELS)
def test_at_the_price_of_one_instant_no_known_way_of_a_segment_is_better(name: str) -> None:
    p = prepared(name)
    columns = Columns(p.pricer)
    known = burst_choices(p.profile, p.pricer)
    whole = columns.base
    rng = random.Random(0)
    compared = 0
    for _ in range(3):
        at = p.graph.forward_end
        price = rng.uniform(0.2, 3.0) * whole.time_s / whole.peak_bytes
        found = columns.at({at: price}, ())
        for segment in columns.segments:
            inside = [c for c in known if within(c, segment, p.pricer.born)]
            mine = [c for c in found if within(c, segment, p.pricer.born)]
            prices = {at: price}
            best = min((worth_s(p.pricer, c, segment, prices) for c in inside), default=0.0)
            if best >= 0:
                continue  # to keep everything is as good
            compared += 1
            made = min((worth_s(p.pricer, c, segment, prices) for c in mine), default=0.0)
            assert made <= best + CLOSE * abs(best) + p.profile.burst_s
    assert compared


class Inner(nn.Module):
    """Two linear layers, and the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.up(x).tanh())
        return out


@pytest.mark.parametrize("alike", [True, False])
def test_rows_of_a_long_chain_are_looked_at_where_alike_or_when_all_are(alike: bool) -> None:
    model = Chain(*(Inner(16 if alike else 16 + n) for n in range(40)))
    found = caught(model, rows(512), loss_fn=scalar_loss)
    columns = Columns(Pricer(found.graph, found.profile))
    middle = columns.segments[20][0]

    def has_early_rows() -> bool:
        dear_s = 3 * columns.base.time_s / columns.base.peak_bytes
        choices = columns.at({found.graph.forward_end: dear_s}, ())
        born = [[columns.pricer.born[s] for s in choice.takes] for choice in choices]
        return any(
            max(b) < middle and sum(min(b) < last <= max(b) for _, last in columns.segments) > 1
            for b in born
        )

    assert len(columns.segments) > 32
    assert has_early_rows() is alike
    assert columns.widen()
    assert has_early_rows()
    assert not columns.widen()


def within(choice: Choice, segment: tuple[int, int], born: np.ndarray) -> bool:
    return all(segment[0] <= born[s] < segment[1] for s in choice.takes)


def test_bursts_that_drop_nothing_are_no_choice() -> None:
    p = prepared("gpt2")
    base = p.pricer.estimate(actckpt.Plan(""))
    way = plan_of(burst_choices(p.profile, p.pricer)[:1]).bursts
    assert priced(p.pricer, base, way) is not None
    assert priced(p.pricer, base, tuple(replace(b, drops=(), inner=()) for b in way)) is None


@pytest.mark.parametrize("name", ["gpt2", "unet", "t5"])
def test_the_linear_program_bounds_what_the_integer_program_finds(name: str) -> None:
    p = prepared(name)
    packing = Packing(p.pricer, burst_choices(p.profile, p.pricer))
    whole = p.pricer.estimate(actckpt.Plan("none"))
    lowest = packing.relaxation().least_peak()
    assert lowest is not None
    assert sum(lowest.prices.values()) == pytest.approx(1.0)
    budget = int((lowest.value + whole.peak_bytes) / 2)
    relaxed = packing.relaxation().least_time(budget)
    picked = packing.fastest(budget)
    assert relaxed is not None
    assert picked is not None
    assert all(price > 0 for price in relaxed.prices.values())
    assert relaxed.value <= sum(choice.time_s for choice in picked) * (1 + 1e-6)
    assert p.pricer.estimate(plan_of(picked)).peak_bytes <= budget
    assert packing.relaxation().least_time(int(0.9 * lowest.value)) is None
    smallest = packing.least_memory()
    assert smallest is not None
    assert p.pricer.estimate(smallest).peak_bytes >= lowest.value * (1 - 1e-6)


def test_made_to_measure_choices_lower_what_the_first_ones_cannot() -> None:
    p = prepared("unet")
    columns = Columns(p.pricer)
    packing = Packing(p.pricer, burst_choices(p.profile, p.pricer))
    before = packing.relaxation().least_peak()
    assert before is not None
    dear = 3 * columns.base.time_s / columns.base.peak_bytes
    prices = {at: price * dear for at, price in before.prices.items()}
    fresh = columns.at(prices, packing.choices)
    after = packing.joined_by(fresh).relaxation().least_peak()
    assert after is not None
    assert after.value < before.value
    # the same question gives nothing new
    assert columns.at(prices, [*packing.choices, *fresh]) == []


@pytest.mark.parametrize("name", ["lstm", "unet"])
def test_the_smallest_peak_does_not_depend_on_the_budget(name: str) -> None:
    p = prepared(name)
    found = set()
    for budget in (1, 1000):
        with pytest.raises(actckpt.BudgetError) as error:
            actckpt.POLICIES["optimal"](p.graph, p.profile, budget)
        found.add(error.value.smallest_bytes)
    assert len(found) == 1
    plan = actckpt.POLICIES["optimal"](p.graph, p.profile, found.pop())
    assert plan.bursts


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_linear_program_says_whether_its_answer_is_the_best_way(name: str) -> None:
    p = prepared(name)
    columns = Columns(p.pricer)
    price = columns.base.time_s / columns.base.peak_bytes
    prices = {p.graph.forward_end: price, (p.graph.forward_end + len(p.graph.ops)) // 2: price}
    answers = set()
    for first, last in zip(columns.segments, columns.segments[1:], strict=False):
        program = StagedSegment(p.pricer, (first[0], last[1]), 4)
        cost = program.costs(prices)
        best, quick = (program.solver(cost, whole=whole)() for whole in (True, False))
        assert best.chosen is not None
        assert quick.chosen is not None
        assert best.whole
        answers.add(quick.whole)
        if quick.whole:
            limits = program._limits
            assert (limits.A @ quick.chosen >= limits.lb).all()
            assert cost @ quick.chosen <= cost @ best.chosen + 1e-9 * abs(cost).sum()
        else:  # rounded: what is made of it can run all the same
            way = program.bursts(quick.chosen)
            assert not way or priced(p.pricer, columns.base, way) is not None
    assert True in answers
