"""What holds for every plan of every policy on every model of the suite."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan, Region
from actckpt.data.profile import Profile
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.regions import place
from actckpt.planning.margin import AIM
from actckpt.planning.request import Planned
from actckpt.policies import POLICIES, Policy
from actckpt.profiler.census import resident_bytes
from actckpt.profiler.meter import AllocatorMeter
from actckpt.rewriting.program import Program
from tests.predictions import Prepared, in_force, live_storages, planned, prepared, smallest
from tests.suite import CASES, Case, step, trainable

FIXED = tuple(name for name in POLICIES if name not in ("auto", "calls", "optimal", "rotor"))
# plan -> policy, share of the untouched peak; the smallest budget where that is more
BUDGETED = {
    "calls at its smallest": ("calls", 0.0),
    "rotor at its smallest": ("rotor", 0.0),
    "optimal at its smallest": ("optimal", 0.0),
    "optimal at 60 %": ("optimal", 0.6),
    "auto at 50 %": ("auto", 0.5),
}
# where a budget in between is tried, too; the grid (`make grid`) has them all
BETWEEN = ("gpt2", "resnet", "t5", "mixtral", "lstm")
# plans of some budgets are not tried with every model
ONLY = {
    "auto at 50 %": BETWEEN,
    "rotor at its smallest": ("gpt2",),
    "optimal at its smallest": ("gpt2", "t5"),
}
PLANS = [
    pytest.param(name, which, id=f"{name}-{which}")
    for name in CASES
    for which in (*FIXED, *(w for w in BUDGETED if name in ONLY.get(w, CASES)))
]

each_plan = pytest.mark.parametrize(("name", "which"), PLANS)


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with state, and with fewer operations to trace than Adam."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def subject(name: str) -> Prepared:
    return prepared(name, momentum)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan, the budget that it is for (or None), and what its policy was asked and said first."""

    planned: Planned
    budget_bytes: int | None
    asked_bytes: int | None
    said: Plan | None


def choose(name: str, policy: str, budget_bytes: int | None) -> Chosen:
    """Plans, and listens to the policy."""
    decide = POLICIES[policy]
    heard: list[tuple[int | None, Plan | None]] = []

    def overheard(graph: Graph, profile: Profile, asked_bytes: int | None) -> Plan:
        try:
            plan = decide(graph, profile, asked_bytes)
        except BudgetError as error:
            heard.append((asked_bytes, error.smallest_plan))
            raise
        heard.append((asked_bytes, plan))
        return plan

    with patch.dict(POLICIES, {policy: overheard}):
        found = planned(subject(name), policy, budget_bytes)
    return Chosen(found, budget_bytes, *heard[0])


@cache
def chosen(name: str, which: str) -> Chosen:
    """Planned once for all that is checked: the integer programs are most of this file's time."""
    if which in FIXED:
        return choose(name, which, None)
    policy, share = BUDGETED[which]
    budget_bytes = math.ceil(share * subject(name).pricer.price(Plan("none")).peak_bytes)
    try:
        return choose(name, policy, budget_bytes or smallest(subject(name), policy))
    except BudgetError as error:
        return choose(name, policy, error.smallest_bytes)


def plan_of(name: str, which: str) -> Planned:
    return chosen(name, which).planned


@dataclass
class Observed:
    """What two real steps leave behind, and what they were seen to need."""

    live_bytes: int = 0
    peak_bytes: int = 0
    left: dict[str, str] = field(default_factory=dict)


def digest(tensor: torch.Tensor) -> str:
    """Stands for every bit of a tensor."""
    flat = tensor.detach().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest() + str(
        tuple(tensor.shape)
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Operations run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def observe(case: Case, program: Program | None) -> Observed:
    """Two steps of a fresh model: one under the live meter, one under the allocator's."""
    model, batch = case.build(), case.batch()
    optimizer = momentum(trainable(model))
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()  # both steps find its state
    model.zero_grad(set_to_none=True)
    seen = Observed()

    def note(number: int, loss: torch.Tensor) -> None:
        found: dict[str, Any] = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        found |= {f"buffer {n}": b for n, b in model.named_buffers()}
        found |= {"loss": loss, "random state": torch.get_rng_state()}
        if number:
            found |= {f"parameter {n}": p.detach() for n, p in model.named_parameters()}
        seen.left |= {f"{k}, step {number}": digest(t) for k, t in found.items() if t is not None}
        model.zero_grad(set_to_none=True)

    torch.manual_seed(0)
    with in_force(model, program) if program is not None else nullcontext():
        with live_storages(model, optimizer, batch) as live:
            loss = step(case, model, batch, optimizer)
            seen.live_bytes = live.peak_bytes
        note(0, loss)
        gc.collect()
        closed_over = getattr(case.loss_fn, "__closure__", None) or ()
        inputs = (batch, [cell.cell_contents for cell in closed_over])
        residents = resident_bytes(model, optimizer, inputs)
        with AllocatorMeter() as meter:
            loss = step(case, model, batch, optimizer)
        seen.peak_bytes = sum(residents.values()) + meter.peak_bytes
        note(1, loss)
    return seen


# what a plan recomputes
Parts = tuple[Region | Burst, ...]
PROGRAMS: dict[tuple[str, Parts], Program] = {}


@cache
def observed(name: str, parts: Parts) -> Observed:
    """The steps under a plan, taken once for all policies that made it."""
    return observe(CASES[name], PROGRAMS[name, parts] if parts else None)


def steps_of(name: str, which: str) -> Observed:
    plan = plan_of(name, which)
    parts: Parts = (*plan.plan.regions, *plan.plan.bursts)
    PROGRAMS[name, parts] = plan.program
    return observed(name, parts)


@each_plan
def test_plan_is_well_formed_and_reads_back(name: str, which: str) -> None:
    plan, graph = plan_of(name, which).plan, subject(name).graph
    assert len(place(graph, plan)) == len(list(plan.walk()))
    assert len(place_bursts(Recomputation(graph), plan)) == len(list(plan.walk_bursts()))
    assert Plan.from_json(json.dumps(plan.to_json())) == plan


def decided(policy: Policy, p: Prepared, budget_bytes: int | None) -> Plan | None:
    """The plan of a policy, or the smallest that it offers instead."""
    try:
        return policy(p.graph, p.profile, budget_bytes)
    except BudgetError as error:
        return error.smallest_plan


@each_plan
def test_policy_decides_the_same_again(name: str, which: str) -> None:
    found = chosen(name, which)
    if found.budget_bytes is None:
        assert found.said == found.planned.plan
    else:
        assert found.asked_bytes == math.floor(found.budget_bytes * AIM)
    policy = POLICIES[which if which in FIXED else BUDGETED[which][0]]
    assert decided(policy, subject(name), found.asked_bytes) == found.said


@each_plan
def test_price_agrees_with_dry_run(name: str, which: str) -> None:
    plan = plan_of(name, which)
    # bursts inside others may be priced too high, never too low
    above = 0.1 if any(b.inner for b in plan.plan.bursts) else 0.02
    for priced, dry in (
        (plan.price.peak_bytes, plan.dry.peak_bytes),
        (plan.price.added_bytes, plan.dry.added_bytes),
    ):
        assert 0.98 * dry <= priced <= (1 + above) * dry


@each_plan
def test_dry_run_agrees_with_real_steps(name: str, which: str) -> None:
    dry, real = plan_of(name, which).dry, steps_of(name, which)
    assert dry.live_bytes == pytest.approx(real.live_bytes, rel=1e-3)
    assert 0.995 <= dry.peak_bytes / real.peak_bytes <= 1.02
    budget = chosen(name, which).budget_bytes
    assert budget is None or real.peak_bytes <= budget


@each_plan
def test_a_planned_model_trains_bitwise_as_the_untouched_one(name: str, which: str) -> None:
    expected, found = observed(name, ()).left, steps_of(name, which).left
    assert found.keys() == expected.keys()
    different = [k for k, t in expected.items() if t != found[k]]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:5]}"


@pytest.mark.parametrize("name", ["gpt2", "resnet", "mixtral"])
def test_on_several_threads_too(name: str) -> None:
    with threads(2):
        expected = observe(CASES[name], None).left
        for which in ("full", "optimal at 60 %"):
            found = observe(CASES[name], plan_of(name, which).program).left
            assert found == expected
