"""Plans made on drawn costs: what is planned must not be right for this machine's costs only.

Which operations a policy recomputes, where it prunes and what it captures depend on measured times;
a machine shows a few of those plans. Drawn times show others.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import actckpt
from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.planning.choosing import choose_plan
from actckpt.planning.request import Planned, Request
from actckpt.profiler.build import build_profile
from tests.exact import differences, outcome, scalar_loss
from tests.models.blocks import Chain
from tests.models.oddities import ODDITIES, WIDTH
from tests.predictions import autocast
from tests.suite import CASES, seeded
from tests.test_invariants import observe, observed, subject

# planned by operations in this order of magnitude of seconds, whatever the costs; others are slow
QUICK = [name for name in CASES if name not in ("mlp64", "siamese", "mixtral", "t5", "unet")]
OVERHEADS = ("dispatch", "region", "save", "follow", "pass", "burst", "burst_op", "burst_save")


def drawn_profile(profile: Profile, rng: random.Random) -> Profile:
    """Times of several orders of magnitude, and an engine of its own speed."""
    magnitudes = rng.choice((1, 3, 6))
    speed = rng.choice((0.0, 0.1, 1.0))
    return replace(
        profile,
        costs=tuple(
            replace(c, time_s=1e-5 * 10 ** (magnitudes * rng.uniform(-0.5, 0.5)))
            for c in profile.costs
        ),
        **{f"{name}_s": speed * getattr(profile, f"{name}_s") for name in OVERHEADS},
    )


def drawn_plan(name: str, policy: str, rng: random.Random) -> tuple[Planned, int]:
    """A plan of the policy and its budget: a drawn one, or else the smallest."""
    p = subject(name)
    profile = drawn_profile(p.profile, rng)
    budget_bytes = math.ceil(rng.uniform(0.4, 0.95) * p.pricer.price(Plan("none")).peak_bytes)

    def planned(budget_bytes: int) -> Planned:
        request = Request(budget_bytes, policy, "step")
        with autocast(p.case):
            return choose_plan(p.model, p.step, request, p.graph, profile)

    try:
        return planned(budget_bytes), budget_bytes
    except BudgetError as error:
        budget_bytes = error.smallest_bytes or 0
        return planned(budget_bytes), budget_bytes


@pytest.mark.parametrize("seed", range(24))
def test_drawn_models_on_drawn_costs_are_exact(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    kinds = [rng.choice(ODDITIES) for _ in range(rng.randint(3, 7))]
    policy = rng.choice(("auto", "auto", "calls", "selective"))
    share = rng.uniform(0.3, 0.97)
    make = seeded(lambda: Chain(*(kind() for kind in kinds)))
    batch = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed))
    whole = actckpt.measure(make(), batch, loss_fn=scalar_loss, steps=1)

    def build(graph: Graph, **_: Any) -> Profile:
        return drawn_profile(build_profile(graph, progress=False), random.Random(seed))

    monkeypatch.setattr("actckpt.planning.making.build_profile", build)
    model = make()

    def optimize(budget_gb: float) -> None:
        actckpt.optimize(
            model, budget_gb, batch=batch, loss_fn=scalar_loss, policy=policy, scope="activations"
        )

    try:
        optimize(share * whole.added_bytes / 1e9)
    except BudgetError as error:
        optimize((error.smallest_bytes or 0) / 1e9)
    # the first run of a kernel in a process may differ from later ones
    outcome(make(), batch, steps=1)
    assert differences(outcome(make(), batch, steps=3), outcome(model, batch, steps=3)) == []


@pytest.mark.parametrize("policy", ["optimal", "calls", "selective"])
@pytest.mark.parametrize("name", QUICK)
def test_plans_on_drawn_costs_are_exact_and_fit(name: str, policy: str) -> None:
    planned, budget_bytes = drawn_plan(name, policy, random.Random(f"{name} {policy}"))
    expected, found = observed(name, ()), observe(CASES[name], planned.program)
    assert [k for k, digest in expected.left.items() if found.left.get(k) != digest] == []
    assert planned.dry.live_bytes == pytest.approx(found.live_bytes, rel=1e-3)
    assert 0.995 <= planned.dry.peak_bytes / found.peak_bytes <= 1.02
    assert found.peak_bytes <= budget_bytes
