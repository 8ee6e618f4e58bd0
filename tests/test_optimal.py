"""The planner by operations against the optimum, its bound, and itself at other budgets."""

from __future__ import annotations

import dataclasses
import itertools
from unittest.mock import patch

import pytest

import actckpt
from actckpt.data.profile import Cost
from actckpt.interpreting.recomputation import Recomputation
from actckpt.policies import optimal
from actckpt.policies.exhaustive import MOST_RESULTS
from actckpt.policies.optimal import by_columns
from actckpt.policies.solver.leveled_choices import LeveledChoices
from actckpt.policies.solver.prepared import Prepared
from actckpt.policies.solver.segments import segments
from actckpt.policies.solver.work import DEFAULT_EFFORT, Work
from actckpt.pricing.simulate import Pricer
from experiments.optimality import SMALL, caught, row_of, small
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows
from tests.predictions import prepared
from tests.suite import seeded

# seconds that the planner may miss: its gap, and predictions are not better than that
CLOSE = 0.01


@pytest.mark.parametrize("kind", ["linear, tanh", "wide inside"])
def test_plans_of_small_chains_are_the_best_there_are(kind: str) -> None:
    found = small(kind)
    pricer = Pricer(found.graph, found.profile)
    assert 4 < len(pricer.possible.saves) <= MOST_RESULTS
    whole = pricer.estimate(actckpt.Plan("none"))
    compared = 0
    for share in (0.95, 0.85, 0.75):
        budget = int(share * whole.peak_bytes)
        bound = actckpt.lower_bound(found.graph, found.profile, budget)
        try:
            best = pricer.price(actckpt.exhaustive(found.graph, found.profile, budget))
        except actckpt.BudgetError:
            continue
        compared += 1
        assert bound.step_s <= best.time_s * (1 + 1e-6)
        assert bound.by_operations <= best.time_s / whole.time_s - 1 + 1e-6
        plan = actckpt.POLICIES["optimal"](found.graph, found.profile, budget)
        planned = pricer.price(plan)
        assert planned.peak_bytes <= budget
        assert planned.time_s <= best.time_s * (1 + 1e-6)
    assert compared


@pytest.mark.parametrize("kind", SMALL)
def test_the_solver_for_any_size_finds_the_optimum_of_small_graphs(kind: str) -> None:
    found = small(kind)
    pricer = Pricer(found.graph, found.profile)
    whole = pricer.estimate(actckpt.Plan("none"))
    compared = 0
    for share in (0.95, 0.85, 0.77, 0.7, 0.62):
        budget = int(share * whole.peak_bytes)
        try:
            best = pricer.price(actckpt.exhaustive(found.graph, found.profile, budget))
        except actckpt.BudgetError:
            continue
        compared += 1
        planned = pricer.price(
            by_columns(Prepared(found.graph, found.profile), budget, Work.of(DEFAULT_EFFORT))
        )
        assert planned.peak_bytes <= budget
        assert planned.time_s <= best.time_s * (1 + CLOSE)
    assert compared >= 3


def test_what_is_too_large_to_try_is_said() -> None:
    p = prepared("gpt2")
    with pytest.raises(actckpt.PlanError, match="policy 'optimal'"):
        actckpt.exhaustive(p.graph, p.profile, None)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_a_larger_budget_is_never_slower(name: str) -> None:
    p = prepared(name)
    whole = p.pricer.estimate(actckpt.Plan("none"))
    times = []
    for share in (0.95, 0.8, 0.7, 0.6):
        plan = actckpt.POLICIES["optimal"](p.graph, p.profile, int(share * whole.peak_bytes))
        price = p.pricer.price(plan)
        assert price.peak_bytes <= share * whole.peak_bytes
        times.append(price.time_s)
    for larger, smaller in itertools.pairwise(times):
        assert larger <= smaller * (1 + 0.2 * CLOSE)


def test_blocks_of_long_chains_are_recomputed_together_wherever_they_are() -> None:
    """Too little for what each block would be made again from."""
    found = caught(seeded(chain(34))(), rows(2048), loss_fn=scalar_loss)
    # whether it pays depends on what operations take: not on how busy this machine is
    flat = dataclasses.replace(found.profile, costs=(Cost(1e-4),) * len(found.profile.costs))
    pricer = Pricer(found.graph, flat)
    budget = int(0.24 * pricer.estimate(actckpt.Plan("none")).peak_bytes)
    plan = actckpt.POLICIES["optimal"](found.graph, flat, budget)
    assert pricer.price(plan).peak_bytes <= budget
    parts = segments(pricer.possible)
    assert len(parts) > 32
    every = plan.walk_bursts()
    assert any(sum(b.ops[0] < last <= b.ops[-1] for _, last in parts) > 3 for b in every)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_plans_of_chains_meet_the_bound_where_the_engine_costs_nothing(name: str) -> None:
    p = prepared(name)
    free = dataclasses.replace(
        p.profile, dispatch_s=0.0, region_s=0.0, save_s=0.0, follow_s=0.0, pass_s=0.0,
        stretch_s=0.0, burst_s=0.0, burst_op_s=0.0, burst_save_s=0.0,
    )  # fmt: skip
    whole = p.pricer.estimate(actckpt.Plan("none"))
    for share in (0.75, 0.6, 0.5):
        budget = int(share * whole.peak_bytes)
        plan = actckpt.POLICIES["optimal"](p.graph, free, budget)
        bound = actckpt.lower_bound(p.graph, free, budget)
        price = actckpt.price(p.graph, free, plan)
        assert bound.overhead > 0
        assert price.time_s - bound.step_s <= 0.003 * whole.time_s


@pytest.mark.parametrize("name", ["gpt2", "vit", "bert", "t5"])
def test_plans_are_close_to_the_bound_of_their_kind(name: str) -> None:
    p = prepared(name)
    whole = p.pricer.estimate(actckpt.Plan("none"))
    for share in (0.8, 0.6):
        budget = int(share * whole.peak_bytes)
        plan = actckpt.POLICIES["optimal"](p.graph, p.profile, budget)
        overhead = p.pricer.price(plan).time_s / whole.time_s - 1
        bound = actckpt.lower_bound(p.graph, p.profile, budget)
        # by points, or by a part of it where a busy machine has made the engine dear
        above = 3 * CLOSE + 0.1 * bound.by_operations
        assert -1e-6 <= overhead - bound.by_operations <= above
        # of the kind that does not follow the forward, less can be said
        assert bound.overhead == bound.by_calls < bound.by_operations


def test_auto_takes_regions_only_where_they_are_faster_without_following() -> None:
    p = prepared("bert")
    budget = int(0.6 * p.pricer.estimate(actckpt.Plan("none")).peak_bytes)
    auto = actckpt.POLICIES["auto"]
    dear = {name: 20 * getattr(p.profile, name) for name in ("follow_s", "pass_s", "stretch_s")}
    followed = dataclasses.replace(p.profile, **dear)
    plan, calls = (
        auto(p.graph, followed, budget),
        actckpt.POLICIES["calls"](p.graph, followed, budget),
    )
    price = Pricer(p.graph, followed).price(plan)
    # they would be faster, and are not believed to be
    assert plan.bursts
    assert actckpt.price(p.graph, followed, calls).time_s < price.time_s
    filled = dataclasses.replace(p.profile, burst_save_s=1.0)
    assert auto(p.graph, filled, budget).regions


@pytest.mark.parametrize("name", ["gpt2", "unet", "t5"])
def test_segments_leave_nothing_out(name: str) -> None:
    possible = Recomputation(prepared(name).graph)
    found = segments(possible)
    assert found[0][0] == possible.span[0]
    assert found[-1][1] == possible.span[1]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))


def test_segments_begin_where_what_they_read_is_saved() -> None:
    """The blocks of this chain are its tanh, each of which reads a product that nothing saves."""
    graph = small("linear, tanh").graph
    possible = Recomputation(graph)
    found = segments(possible)
    assert len(found) > 6
    for begin in (first for first, _ in found[1:]):
        read = {sid for index in range(begin, possible.span[1]) for sid in possible.inputs(index)}
        crossing = {sid for sid in read & set(possible.makers) if graph.storages[sid].born < begin}
        assert crossing <= possible.saves.keys()


def test_a_row_of_the_experiment_says_what_was_found() -> None:
    row = row_of("small", small("linear, tanh"), 0.9)
    assert row["by"] in ("operations", "calls")
    assert row["used"] <= 1
    assert row["gap"] >= -1e-6


def test_what_linear_programs_find_is_enough_where_little_could_be_gained() -> None:
    p = prepared("gpt2")
    whole = p.pricer.estimate(actckpt.Plan("none"))
    budget = int(0.85 * whole.peak_bytes)

    def searched(little: float, near: float) -> tuple[float, int]:
        with (
            patch.object(optimal, "LeveledChoices", side_effect=LeveledChoices) as levels,
            patch.object(optimal, "_LITTLE", little),
            patch.object(optimal, "_NEAR", near),
        ):
            plan = actckpt.POLICIES["optimal"](p.graph, p.profile, budget)
        price = p.pricer.price(plan)
        assert price.peak_bytes <= budget
        return price.time_s, levels.call_count

    near, little = optimal._NEAR, optimal._LITTLE
    alone_s, levels = searched(-1.0, near)
    assert levels == 1
    tried_s, levels = searched(1.0, -1.0)  # tried, and not enough
    assert levels == 1
    assert tried_s <= alone_s + 1e-3 * whole.time_s
    assert searched(1.0, 1.0)[1] == 0
    # besides, what choices take together is not quite the sum that the programs see
    assert searched(little, near)[0] <= alone_s + (near + 1e-3) * whole.time_s
