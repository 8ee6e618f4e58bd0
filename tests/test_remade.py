"""What the bound charges for results that are made again, against what plans pay of the engine."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from actckpt.bursts import place_bursts
from actckpt.plan import Plan
from actckpt.policies import POLICIES
from actckpt.policies.bound import lower_bound
from actckpt.policies.makers import Makers
from actckpt.policies.remade import least_remade_s
from actckpt.pricing.simulate import Pricer
from actckpt.recomputation import Recomputation
from actckpt.regions import place
from tests.burst_plans import drawn, each_alone, everything
from tests.predictions import prepared

LOOSER = 1e-6
MODELS = ("bert", "mlp64", "densenet", "t5")
# the engine that is not looked at costs so much that nobody is charged for it
DEAR_S = 1.0


@functools.cache
def engine(name: str, by: str) -> Pricer:
    """Prices by what the engine takes alone, as if operations took no time."""
    p = prepared(name)
    free = tuple(dataclasses.replace(cost, time_s=0.0) for cost in p.profile.costs)
    profile = dataclasses.replace(p.profile, costs=free)
    if by == "calls":
        profile = dataclasses.replace(profile, burst_save_s=DEAR_S)
    else:
        profile = dataclasses.replace(profile, save_s=DEAR_S, region_s=DEAR_S * len(p.graph.saves))
    return Pricer(p.graph, profile)


def plans(pricer: Pricer, by: str) -> list[Plan]:
    if by == "calls":
        policies = ("full", "sqrt", "log", "selective")
        return [POLICIES[policy](pricer.graph, pricer.profile, None) for policy in policies]
    return [make(pricer.graph) for make in (each_alone, everything, drawn(1), drawn(2), drawn(3))]


def remade(pricer: Pricer, plan: Plan) -> set[int]:
    """Storages that a plan drops altogether: no save and nothing that is held keeps them."""
    graph = pricer.graph
    dropped: set[int] = set()
    held: set[int] = set()
    for region in place(graph, plan):
        dropped.update(region.dropped)
        if region.parent < 0:
            held.update(region.inputs)
    for burst in place_bursts(Recomputation(graph), plan):
        dropped.update(burst.burst.drops)
        held.update(burst.pins)
    kept = {sid for k, sid in enumerate(pricer.save_storage) if k not in dropped}
    return {pricer.save_storage[k] for k in dropped} - kept - held


@pytest.mark.parametrize("by", ["calls", "operations"])
@pytest.mark.parametrize("name", MODELS)
def test_no_plan_pays_less_than_it_is_charged(name: str, by: str) -> None:
    pricer = engine(name, by)
    graph = pricer.graph
    makers = Makers(graph, 0, graph.forward_end)
    saves = [(sid, graph.saves[k]) for k, sid in enumerate(pricer.save_storage)]
    saved = {
        sid
        for sid, save in saves
        if sid in makers.of and not save.held and save.first_use >= graph.forward_end
    }
    shares = []
    for plan in plans(pricer, by):
        price = pricer.price(plan)
        least_s = least_remade_s(pricer, makers, saved, price.peak_bytes)
        charged_s = sum(least_s[sid] for sid in remade(pricer, plan) & saved)
        assert charged_s <= price.time_s * (1 + LOOSER)
        shares.append(charged_s / price.time_s)
        bound = lower_bound(graph, pricer.profile, price.peak_bytes)
        assert bound.step_s <= price.time_s * (1 + LOOSER)
    assert max(shares) > 0.3  # and it is charged what can be seen
