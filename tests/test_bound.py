"""The lower bound against plans that exist, and the minimum cuts against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.budget_error import BudgetError
from actckpt.data.plan import Plan, Region
from actckpt.errors import PlanError
from actckpt.policies import POLICIES
from actckpt.policies.blocks import blocks, opened, region
from actckpt.policies.selective import saved_ops
from actckpt.policies.solver import residency
from actckpt.policies.solver.bound import lower_bound, smallest_peak
from actckpt.policies.solver.call_choices import call_choices
from actckpt.policies.solver.mincut import trades
from actckpt.policies.solver.packing import Packing
from actckpt.profiler.build import build_profile
from tests.predictions import Prepared, prepared

MODELS = ("gpt2", "unet", "densenet", "lstm", "siamese")
LOOSER = 1e-6  # the solver's tolerances, as a share of the step


def random_plan(p: Prepared, draw: random.Random) -> Plan:
    """Some blocks or their calls, some of their results kept."""
    graph, found = p.graph, []
    for block in blocks(graph):
        stages = (block,) if draw.random() < 0.6 else opened(graph, block)
        for stage in stages:
            if draw.random() < 0.3:
                continue
            s = graph.stages[stage]
            kept = frozenset(i for i in range(s.first, s.last) if draw.random() < 0.3)
            candidate = Region(s.key, s.key, (), saved_ops(graph, s.first, s.last, kept))
            try:
                p.pricer.price(Plan("", (candidate,)))
            except PlanError:
                continue
            found.append(candidate)
    return Plan("random", tuple(found))


@pytest.mark.parametrize("name", MODELS)
def test_no_plan_beats_the_bound_at_its_own_peak(name: str) -> None:
    p = prepared(name)
    draw = random.Random(name)
    plans = [POLICIES[policy](p.graph, p.profile, None) for policy in ("full", "selective")]
    plans += [random_plan(p, draw) for _ in range(2)]
    least_bytes, _ = smallest_peak(p.graph, p.profile)
    for plan in plans:
        price = p.pricer.price(plan)
        assert price.peak_bytes >= least_bytes
        bound = lower_bound(p.graph, p.profile, price.peak_bytes)
        assert bound.possible
        assert bound.step_s <= price.time_s * (1 + LOOSER)


@pytest.mark.parametrize("name", ["gpt2", "densenet"])
def test_auto_is_above_the_bound_which_falls_with_the_budget(name: str) -> None:
    p = prepared(name)
    whole = p.pricer.price(Plan("none"))
    bounds = []
    for share in (0.95, 0.8, 0.65):
        budget = int(share * whole.peak_bytes)
        bound = lower_bound(p.graph, p.profile, budget)
        plan = POLICIES["auto"](p.graph, p.profile, budget)
        assert bound.step_s <= p.pricer.price(plan).time_s * (1 + LOOSER)
        bounds.append(bound.step_s)
    assert bounds == sorted(bounds)
    assert bounds[-1] > whole.time_s
    fits = lower_bound(p.graph, p.profile, whole.peak_bytes)
    assert fits.step_s == pytest.approx(whole.time_s)
    assert fits.overhead == pytest.approx(0)


def test_a_budget_that_nothing_can_meet_is_certified() -> None:
    p = prepared("unet")
    least_bytes, why = smallest_peak(p.graph, p.profile)
    bound = lower_bound(p.graph, p.profile, least_bytes - 1)
    assert not bound.possible
    assert bound.smallest_bytes == least_bytes
    assert "whatever is recomputed" in bound.certificate == why


def test_where_a_solution_is_too_high_as_it_is_run_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = prepared("unet").graph
    profile = build_profile(graph, device="t4")
    budget = int(0.45 * actckpt.price(graph, profile, Plan("none")).peak_bytes)
    bound = lower_bound(graph, profile, budget)
    plan = POLICIES["auto"](graph, profile, budget)
    assert bound.step_s <= actckpt.price(graph, profile, plan).time_s * (1 + LOOSER)
    monkeypatch.setattr(residency, "_MUCH", float("1e6"))
    kept = lower_bound(graph, profile, budget)
    assert kept.by_operations + 0.01 < bound.by_operations


def chain_of(*kinds: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [kind() if kind is not nn.Linear else nn.Linear(8, 8) for kind in kinds]
    return nn.Sequential(nn.Sequential(*parts), nn.Linear(8, 1))


@pytest.mark.parametrize(
    "kinds",
    [
        (nn.Linear, nn.GELU, nn.Linear, nn.Tanh),
        (nn.Linear, nn.Tanh, nn.Dropout, nn.Linear, nn.Sigmoid, nn.Dropout),
        (nn.Linear, nn.Softplus, nn.Linear, nn.ELU, nn.Linear),
    ],
)
def test_trades_are_the_best_of_all_choices(kinds: tuple[type[nn.Module], ...]) -> None:
    graph = actckpt.trace(chain_of(*kinds), torch.randn(4, 8), loss_fn=lambda out: out.sum())
    profile = build_profile(graph, progress=False)
    stage = next(i for i, s in enumerate(graph.stages) if s.path == "0")
    s = graph.stages[stage]
    found = trades(graph, profile, s.first, s.last)
    assert found[0].time_s > 0
    assert found == sorted(found, key=lambda t: (t.bytes, -t.time_s))
    makers = [i for i in range(s.first, s.last) if not graph.ops[i].view]
    born = {sid: storage for sid, storage in enumerate(graph.storages) if s.first <= storage.born}

    def again(kept: set[int]) -> float:
        """Seconds of making what is saved and not kept, from what is kept."""
        made = {
            sid: [i for i in makers if sid in touched(i)]
            for sid in born
            if any(sid in touched(i) for i in makers)
        }
        todo = [
            (graph.values[save.value].storage, save.at)
            for save in graph.saves
            if not save.held and s.first <= save.at <= s.last
        ]
        todo = [(sid, at) for sid, at in todo if sid in made and sid not in kept]
        runs: set[int] = set()
        while todo:
            sid, before = todo.pop()
            for i in made[sid]:
                if i < before and i not in runs:
                    runs.add(i)
                    sources = {graph.values[v].storage for v in graph.ops[i].inputs}
                    todo += [(u, i) for u in sources if u in made and u not in kept]
        draws = [i for i in runs if graph.ops[i].random]
        missing = [i for i in makers if draws and graph.ops[i].random and i < max(draws)]
        runs.update(missing)
        return sum(profile.costs[graph.ops[i].signature].time_s for i in runs)

    def touched(i: int) -> set[int]:
        return {graph.values[v].storage for v in graph.ops[i].outputs}.union(graph.ops[i].writes)

    candidates = [sid for sid in born if any(sid in touched(i) for i in makers)]
    every = [
        (sum(born[sid].bytes for sid in kept), again(set(kept)))
        for size in range(len(candidates) + 1)
        for kept in itertools.combinations(candidates, size)
    ]
    for trade in found:
        # its seconds are those of a choice that exists
        assert any(
            size == trade.bytes and seconds == pytest.approx(trade.time_s, rel=1e-9, abs=1e-12)
            for size, seconds in every
        )
    for a, b in itertools.pairwise(found):
        price = (a.time_s - b.time_s) / (b.bytes - a.bytes)
        line = a.time_s + price * a.bytes
        assert all(seconds + price * size >= line * (1 - 1e-9) for size, seconds in every)


@pytest.mark.parametrize("name", ["gpt2", "densenet", "t5"])
def test_packing_takes_no_call_twice_and_stays_within(name: str) -> None:
    p = prepared(name)
    packing = Packing(p.pricer, call_choices(p.graph, p.profile, p.pricer))
    whole = p.pricer.price(Plan("none")).peak_bytes
    for share in (0.9, 0.7):
        plan = packing.least_time(int(share * whole))
        assert plan is not None
        price = p.pricer.price(plan)  # regions that overlap raise here
        assert price.peak_bytes <= share * whole


def test_report_and_error_say_how_far_from_the_best() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)))
    batch = torch.randn(4096, 64)

    def loss_fn(out: torch.Tensor) -> torch.Tensor:
        return out.sum()

    peak = actckpt.measure(model, batch, loss_fn=loss_fn).peak_bytes
    actckpt.optimize(model, 0.7 * peak / 1e9, batch=batch, loss_fn=loss_fn)
    report = actckpt.report(model)
    assert report.lower_bound is not None
    assert report.gap is not None
    assert 100 * report.lower_bound >= 0
    assert report.gap >= -1e-3
    assert "no plan within the budget has less than" in str(report)
    assert actckpt.Report.from_json(report.to_json()) == report
    with pytest.raises(BudgetError, match="No recomputation plan can fit") as raised:
        actckpt.optimize(model, 1e-6, batch=batch, loss_fn=loss_fn)
    assert raised.value.excluded_bytes is not None
    assert raised.value.smallest_bytes is not None
    assert 1000 < raised.value.excluded_bytes <= raised.value.smallest_bytes
    between = (raised.value.excluded_bytes + raised.value.smallest_bytes) / 2e9
    if between * 1e9 > raised.value.excluded_bytes:
        with pytest.raises(BudgetError, match="can go below"):
            actckpt.optimize(model, between, batch=batch, loss_fn=loss_fn)


def test_blocks_of_equal_structure_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from actckpt.policies.solver import call_choices as module

    p = prepared("gpt2")
    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return trades(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "trades", counted)
    found = module.Options(p.graph, p.profile)
    first, second = blocks(p.graph)[1:3]
    one = [r for _, r in found.within(first)]
    solved = len(calls)
    two = [r for _, r in found.within(second)]
    assert solved > 0
    assert len(calls) == solved
    assert len(one) == len(two)
    assert region(p.graph, first) in one
    assert region(p.graph, second) in two
