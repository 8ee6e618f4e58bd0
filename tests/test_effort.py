"""How long a search may take, asked for as ``effort``; what searches share is made once."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import actckpt
from actckpt.asked import request_of
from actckpt.cli import main
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.policies.auto import Auto
from actckpt.policies.optimal import Optimal
from actckpt.policies.solver.chain_program import ChainProgram
from actckpt.policies.solver.prepared import kept_tables
from actckpt.policies.solver.work import Work
from actckpt.session.kept_plans import KeptPlans, asked_otherwise
from tests.models.blocks import Chain, Residual, rows
from tests.predictions import prepared
from tests.suite import seeded


def tight_bytes(name: str, share: float = 0.6) -> int:
    whole = prepared(name).pricer.estimate(Plan("")).peak_bytes
    return int(share * whole)


@pytest.mark.parametrize("effort", [-0.1, 20.5, math.nan, math.inf, "much", True])
def test_an_effort_that_is_none_is_one_error_before_anything_is_touched(effort: object) -> None:
    model = seeded(lambda: Chain(Residual(8), Residual(8)))()
    before = dict(model.__dict__)
    with pytest.raises(actckpt.ArgumentError, match="effort must be a number from 0"):
        actckpt.optimize(model, 1.0, batch=rows(2, 8), effort=effort)  # type: ignore[arg-type]
    assert model.__dict__ == before


@pytest.mark.parametrize("policy", ["full", lambda graph, profile, budget: Plan("")])
def test_effort_is_for_policies_that_search(policy: object) -> None:
    model = seeded(lambda: Chain(Residual(8), Residual(8)))()
    with pytest.raises(actckpt.ArgumentError, match="effort is for the policies that search"):
        actckpt.optimize(model, 1.0, policy=policy, effort=2)  # type: ignore[arg-type]


class Mine(Auto):
    """A policy of the user's own that begins with one of the library's."""

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        return Plan("mine")


def test_a_policy_made_of_a_search_is_a_policy() -> None:
    model = seeded(lambda: Chain(Residual(8), Residual(8)))()
    actckpt.optimize(model, 1.0, batch=rows(2, 8), policy=Mine())
    assert actckpt.report(model).plan.policy == "mine"


def test_two_efforts_and_a_class_are_refused() -> None:
    with pytest.raises(
        actckpt.ArgumentError, match=r"Auto\(effort=3\) has an effort; found effort=2"
    ):
        request_of(1.0, Auto(3), "step", lambda: 1, 2)
    with pytest.raises(actckpt.PlanError, match=r"pass Auto\(\)"):
        request_of(1.0, Auto, "step", lambda: 1)  # type: ignore[arg-type]


def test_plans_kept_without_an_effort_are_those_of_the_default() -> None:
    plain, default, other = (
        request_of(1.0, policy, "step", lambda: 1) for policy in ("auto", Auto(), Auto(2))
    )
    for kept in (plain, default):
        state = KeptPlans((), (), False).to_json(kept)
        assert asked_otherwise(state, plain) == asked_otherwise(state, default) == ""
        assert asked_otherwise(state, other) == "effort was 1.0 and is now 2.0"
        assert asked_otherwise({**state, "effort": None}, default) == ""


def test_a_search_given_as_a_policy_keeps_its_effort() -> None:
    torch.manual_seed(0)
    model = seeded(lambda: Chain(Residual(8), Residual(8)))()
    actckpt.optimize(model, 1.0, batch=rows(2, 8), policy=Auto(effort=0))
    assert actckpt.report(model).plan.policy == "auto"


def test_more_effort_solves_more_and_its_plan_is_no_slower() -> None:
    p, budget_bytes = prepared("gpt2"), tight_bytes("gpt2")
    solved: list[int] = []
    times: list[float] = []
    for effort in (0.0, 1.0):
        with patch.object(Work, "spend_staged", autospec=True, wraps=Work.spend_staged) as seen:
            price = p.pricer.price(Optimal(effort)(p.graph, p.profile, budget_bytes))
        assert price.peak_bytes <= budget_bytes
        solved.append(seen.call_count)
        times.append(price.time_s)
    assert solved[0] < solved[1]
    assert times[1] <= times[0]


def test_the_same_effort_is_the_same_plan() -> None:
    p, budget_bytes = prepared("gpt2"), tight_bytes("gpt2", 0.7)
    plans = [Auto(0.2)(p.graph, p.profile, budget_bytes) for _ in range(2)]
    assert plans[0] == plans[1]


def test_work_is_counted_by_size_and_ends() -> None:
    work = Work.of(1)
    steps = 0
    while work.is_left:
        work.spend_staged(500, 500)
        steps += 1
        assert steps < 1000
    before_s = work.spent_s
    work.spend_staged(50, 50)
    little_s = work.spent_s - before_s
    assert 0 < little_s < before_s / steps
    assert not Work.of(0).is_left
    assert Work().is_left


def test_one_table_answers_every_budget_of_a_model() -> None:
    real = ChainProgram.__init__
    made: list[object] = []

    def counted(self: ChainProgram, *args: object, **kwargs: object) -> None:
        made.append(self)
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    def plans() -> list[Plan]:
        model, batch = seeded(lambda: Chain(*(Residual(32) for _ in range(6))))(), rows(64, 32)
        found = []
        for budget_gb in (1.2e-4, 1e-4):
            actckpt.optimize(model, budget_gb, batch=batch, loss_fn=lambda out: out.square().mean(),
                             scope="activations", effort=0.2)  # fmt: skip
            found.append(actckpt.report(model).plan)
        return found

    with patch.object(ChainProgram, "__init__", counted):
        with kept_tables():
            together = plans()
        kept = len(made)
        alone = plans()
    assert 0 < kept < len(made) - kept
    assert together == alone  # what came before changes nothing


def test_the_command_line_takes_an_effort(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["plan", "gpt2", "--set", "n_layer=1", "--batch-size", "1", "--seq-len", "8"]
    with pytest.raises(SystemExit):
        main([*arguments, "--budget-gb", "1", "--effort", "-3"])
    assert "'-3' is no number from 0 to 20" in capsys.readouterr().err
