"""Budgets below one level of recomputation: plans with levels, found without a proof first."""

from __future__ import annotations

import math
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.plan import Plan
from actckpt.planning.search import without_residents
from actckpt.policies.auto import Auto
from actckpt.policies.log import log
from actckpt.policies.optimal import Optimal
from actckpt.policies.rotor import rotor
from actckpt.policies.solver.block_chain import BlockChain
from actckpt.policies.solver.chain_plans import chain_plans, plan_of_parts
from actckpt.policies.solver.chain_program import ChainProgram
from actckpt.policies.solver.leveled_choices import LeveledChoices
from actckpt.policies.solver.packing import Packing
from actckpt.policies.solver.piece_chain import PieceChain
from actckpt.policies.sqrt import sqrt
from actckpt.pricing.effect import GENERATOR_STATE_BYTES
from actckpt.pricing.simulate import Pricer
from actckpt.profiler.build import build_profile
from actckpt.tracing.call import Call
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from tests.models.blocks import Chain, Residual, rows
from tests.suite import seeded

# the modules, whose names the policies hide
searching = sys.modules["actckpt.policies.optimal"]
calling = sys.modules["actckpt.policies.by_calls"]
DEPTH = 14
WIDTH = 64


def deep(p: float = 0.1) -> nn.Module:
    return Chain(*(Residual(WIDTH, p) for _ in range(DEPTH)))


def batch() -> torch.Tensor:
    return rows(128, WIDTH)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


@pytest.fixture(scope="module")
def pricer() -> Pricer:
    """A chain of blocks, of which only activations weigh anything."""
    graph = trace_step(seeded(deep)(), Step(Call.of(batch()), loss_of))
    return Pricer(without_residents(graph), build_profile(graph, progress=False))


def shares(plan: Plan, pricer: Pricer) -> tuple[float, float]:
    """(peak, overhead) of a plan relative to the untouched step."""
    whole, price = pricer.estimate(Plan("")), pricer.price(plan)
    return price.peak_bytes / whole.peak_bytes, price.time_s / whole.time_s - 1


@pytest.mark.parametrize(("policy", "share"), [("rotor", 0.3), ("optimal", 0.2), ("calls", 0.25)])
def test_little_memory_costs_bits_nowhere(policy: str, share: float, pricer: Pricer) -> None:
    budget_bytes = share * pricer.estimate(Plan("")).peak_bytes
    losses = []
    for optimized in (False, True):
        model = seeded(deep)()
        optimizer = torch.optim.AdamW(model.parameters())
        if optimized:
            actckpt.optimize(model, budget_bytes / 1e9, batch=batch(), loss_fn=loss_of,
                             policy=policy, scope="activations")  # fmt: skip
            measured = actckpt.measure(model, batch(), loss_fn=loss_of, steps=1)
            assert measured.added_bytes <= budget_bytes
        torch.manual_seed(3)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model(batch()))
            loss.backward()
            optimizer.step()
        state = [loss.detach(), torch.get_rng_state(), *model.state_dict().values()]
        losses.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_rotor_is_no_slower_than_halves_or_equal_parts_in_their_memory(pricer: Pricer) -> None:
    # the program counts up to one block's output more than is priced
    block_bytes = 4 * 128 * WIDTH + GENERATOR_STATE_BYTES
    for policy in (log, sqrt):
        other = policy(pricer.graph, pricer.profile, None)
        peak, overhead = shares(other, pricer)
        budget_bytes = int(peak * pricer.estimate(Plan("")).peak_bytes) + block_bytes
        mine = rotor(pricer.graph, pricer.profile, budget_bytes)
        assert shares(mine, pricer)[1] <= overhead + 0.002  # bytes are counted in units


@pytest.mark.parametrize("form", [BlockChain, PieceChain])
def test_one_table_answers_every_budget_and_less_is_never_faster(
    form: type[BlockChain | PieceChain], pricer: Pricer
) -> None:
    whole = pricer.estimate(Plan(""))
    plans = chain_plans(form(pricer))
    assert plans is not None
    assert plans.smallest is not None
    least_bytes = pricer.estimate(plan_of_parts(plans.smallest)).peak_bytes
    tighter_s = math.inf
    for n in range(9):
        budget_bytes = math.ceil(least_bytes * (whole.peak_bytes / least_bytes) ** (n / 8))
        found = plans.fastest(budget_bytes)
        assert found is not None
        price = pricer.price(plan_of_parts(found))
        assert price.peak_bytes <= budget_bytes
        # what the program says and what is priced differ by little
        assert price.time_s <= tighter_s + 0.02 * whole.time_s
        tighter_s = price.time_s
    assert plans.fastest(least_bytes // 2) is None


def test_few_bytes_are_counted_in_small_units_and_one_search_needs_one_table(
    pricer: Pricer,
) -> None:
    real = ChainProgram.__init__
    made: list[ChainProgram] = []

    def counted(self: ChainProgram, *args: Any) -> None:
        made.append(self)
        real(self, *args)

    whole = pricer.estimate(Plan("")).peak_bytes
    with patch.object(ChainProgram, "__init__", counted):
        levels = LeveledChoices(pricer)
        for share in (0.18, 0.6):  # neighbours of the first lie about a quarter
            assert levels.fastest(int(share * whole))
            assert levels.near(int(share * whole))
    small, large = made
    assert 3 * small.unit_bytes < large.unit_bytes


def test_where_a_plan_is_at_hand_nothing_is_proved_about_the_other_kind(pricer: Pricer) -> None:
    whole = pricer.estimate(Plan("")).peak_bytes

    def never(*_: object) -> None:
        raise AssertionError("looked for the least memory without need")

    with patch.object(calling, "_smallest", never), patch.object(Packing, "smallest", never):
        least_bytes = math.ceil(0.17 * whole)
        plan = Auto(0)(pricer.graph, pricer.profile, least_bytes)
        assert shares(plan, pricer)[0] * whole <= least_bytes
        with pytest.raises(actckpt.BudgetError):
            Optimal(0)(pricer.graph, pricer.profile, int(0.01 * whole))


def test_what_is_at_hand_needs_no_proof_that_there_is_nothing_else(pricer: Pricer) -> None:
    whole = pricer.estimate(Plan("")).peak_bytes

    def never(*_: object) -> None:
        raise AssertionError("looked for a way below the budget that is met")

    with patch.object(searching, "_searched", never):
        actckpt.POLICIES["optimal"](pricer.graph, pricer.profile, int(0.2 * whole))
        with pytest.raises(actckpt.BudgetError) as error:
            actckpt.POLICIES["optimal"](pricer.graph, pricer.profile, int(0.01 * whole))
    least_bytes = error.value.smallest_bytes
    assert least_bytes is not None
    plan = actckpt.POLICIES["optimal"](pricer.graph, pricer.profile, least_bytes)
    assert shares(plan, pricer)[0] * whole <= least_bytes
    assert any(burst.inner for burst in plan.bursts)


def test_generators_states_are_kept_once_a_call_however_often_it_draws_again(
    pricer: Pricer,
) -> None:
    plans = chain_plans(PieceChain(pricer))
    assert plans is not None
    plan = plan_of_parts(plans.smallest or ())
    drawn = [
        {
            pricer.possible.call_of(i)
            for b in burst.walk()
            for i in b.ops
            if pricer.graph.ops[i].random
        }
        for burst in plan.bursts
    ]
    states = [
        [start for start, _, size in effect.extra if size == GENERATOR_STATE_BYTES]
        for effect in pricer.estimate(plan).effects
    ]
    assert [len(s) for s in states] == [len(d) for d in drawn]
    assert max(map(len, drawn)) > 3


def test_rotor_needs_a_chain() -> None:
    for build in (lambda: nn.Linear(WIDTH, WIDTH), lambda: Chain(Residual(WIDTH))):
        model = seeded(build)()
        before = dict(model.__dict__)
        with pytest.raises(actckpt.PlanError, match="rotor needs a chain of two or more blocks"):
            actckpt.optimize(model, 1e-5, batch=batch(), loss_fn=loss_of, policy="rotor")
        assert model.__dict__ == before


class Crossing(nn.Module):
    """Blocks whose result is made wide, and then blocks of another chain that all read that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Residual(WIDTH) for _ in range(DEPTH // 2))
        self.widen = nn.Sequential(nn.Linear(WIDTH, 16 * WIDTH), nn.ReLU())
        self.start = nn.Linear(WIDTH, WIDTH)
        self.second = nn.ModuleList(Residual(WIDTH) for _ in range(DEPTH // 2))
        self.read = nn.ModuleList(nn.Linear(16 * WIDTH, WIDTH) for _ in range(DEPTH // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        begun = x
        for block in self.first:
            x = block(x)
        wide = self.widen(x)
        y = self.start(begun)
        for block, read in zip(self.second, self.read, strict=True):
            y = block(y + read(wide))
        out: torch.Tensor = y
        return out


def test_what_many_blocks_read_is_there_until_backward_has_passed_the_first_of_them() -> None:
    graph = trace_step(seeded(Crossing)(), Step(Call.of(batch()), loss_of))
    crossing = Pricer(without_residents(graph), build_profile(graph, progress=False))
    chain = PieceChain(crossing).chain
    assert chain is not None
    wide_bytes = 4 * 128 * 16 * WIDTH
    assert max(chain.before_bytes[: DEPTH // 2]) < wide_bytes <= chain.before_bytes[-2]
