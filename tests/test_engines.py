"""What the bound charges for the engine, against what plans of either kind pay of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import linprog

from actckpt.data.plan import Plan
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.regions import place
from actckpt.policies import POLICIES
from actckpt.policies.solver.bound import lower_bound
from actckpt.policies.solver.engines import Engine, by_calls, by_operations
from actckpt.policies.solver.residency import Residency
from actckpt.pricing.simulate import Pricer
from tests.burst_plans import drawn, each_alone, everything
from tests.predictions import prepared

LOOSER = 1e-6
MODELS = ("bert", "mlp64", "densenet", "t5")


def engine_alone(name: str) -> Pricer:
    """Prices by what the engine takes, as if operations took no time."""
    p = prepared(name)
    free = tuple(dataclasses.replace(cost, time_s=0.0) for cost in p.profile.costs)
    return Pricer(p.graph, dataclasses.replace(p.profile, costs=free))


def plans(
    pricer: Pricer, by: str, policies: tuple[str, ...] = ("full", "sqrt", "log", "selective")
) -> list[Plan]:
    if by == "calls":
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


def charged_s(engine: Engine, gone: set[int], ops: list[int]) -> float:
    """What a plan is charged that makes these storages again and runs these operations."""
    fixed = sum(engine.remade_s[sid] for sid in gone) + engine.again_s * len(ops)
    count = len(engine.columns_s)
    if not count:
        return fixed
    rows = np.zeros((len(engine.rows), count))
    for n, row in enumerate(engine.rows):
        for column, factor in row:
            rows[n, column] = -factor
    least = np.zeros(count)
    least[[column for column, sid in engine.saved if sid in gone]] = 1
    least[[column for column, op in engine.again if op in set(ops)]] = 1
    bounds = [(low, 1) for low in least]
    found = linprog(engine.columns_s, A_ub=rows, b_ub=np.zeros(len(rows)), bounds=bounds)
    assert found.success
    return fixed + float(found.fun)


@pytest.mark.parametrize("by", ["calls", "operations"])
@pytest.mark.parametrize("name", MODELS)
def test_no_plan_pays_less_than_it_is_charged(name: str, by: str) -> None:
    pricer = engine_alone(name)
    program = Residency(pricer.graph, pricer.profile)
    shares = []
    for plan in plans(pricer, by):
        price = pricer.price(plan)
        ops: list[int] = []
        if by == "calls":
            engine = by_calls(pricer, program.uses.keys(), price.peak_bytes)
        else:
            saves = {sid: [use.number for use in uses] for sid, uses in program.uses.items()}
            engine = by_operations(pricer, saves)
            ops = [i for burst in plan.walk_bursts() for i in burst.ops]
        charged = charged_s(engine, remade(pricer, plan) & program.uses.keys(), ops)
        assert charged <= price.time_s * (1 + LOOSER)
        shares.append(charged / price.time_s)
    assert max(shares) > (0.3 if by == "calls" else 0.9)  # and it is charged what can be seen


@pytest.mark.parametrize("by", ["calls", "operations"])
@pytest.mark.parametrize("name", MODELS)
def test_each_kind_is_above_its_bound(name: str, by: str) -> None:
    p = prepared(name)
    whole_s = p.pricer.price(Plan("none")).time_s
    for plan in plans(p.pricer, by, ("sqrt", "selective")):
        price = p.pricer.price(plan)
        bound = lower_bound(p.graph, p.profile, price.peak_bytes)
        least = bound.by_calls if by == "calls" else bound.by_operations
        assert least <= price.time_s / whole_s - 1 + LOOSER
        assert bound.overhead == min(bound.by_calls, bound.by_operations)
        assert bound.step_s == pytest.approx(whole_s * (1 + bound.overhead))


def test_a_forward_that_cannot_be_followed_has_no_plan_by_operations() -> None:
    p = prepared("mlp64")
    graph = dataclasses.replace(p.graph, calls=())
    assert Recomputation(graph).refusal
    peak_bytes = p.pricer.price(Plan("none")).peak_bytes
    bound = lower_bound(graph, p.profile, int(0.8 * peak_bytes))
    assert bound.by_operations == math.inf
    assert 0 < bound.overhead == bound.by_calls
