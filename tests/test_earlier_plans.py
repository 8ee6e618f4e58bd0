"""Whether an earlier plan is still the one: same forward, no less resident, priced and run dry."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.planning.earlier import kept_plan
from actckpt.planning.making import make_plan
from actckpt.planning.request import Planned, Request
from actckpt.planning.same_forward import grows_residents, same_forward
from actckpt.planning.search import Search
from actckpt.profiler.build import build_profile
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import optimizers_of
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")


def a_step(model: nn.Module, *, momentum: float | None = None, **more: Any) -> Step:
    optimizer = None
    if momentum is not None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    return Step(Call.of(rows(48)), scalar_loss, None, optimizers_of(optimizer), **more)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(chain(4, 0.1))()


def test_more_may_be_resident_and_nothing_may_be_gone(model: nn.Module) -> None:
    steps = (a_step(model), a_step(model, momentum=0.9), a_step(model, accumulate=True))
    bare, stateful, accumulating = (trace_step(model, step) for step in steps)
    for more in (stateful, accumulating):
        assert same_forward(bare, more)
        assert grows_residents(bare, more)
        assert not grows_residents(more, bare)
    # as many bytes, but gradients that a backward finds are not there from its beginning
    heavy = dataclasses.replace(bare, storages=accumulating.storages)
    assert not grows_residents(accumulating, heavy)


def test_another_forward_is_not_the_same(model: nn.Module) -> None:
    graphs = [
        trace_step(m, a_step(m)) for m in (model, seeded(chain(4))(), seeded(chain(5, 0.1))())
    ]
    assert same_forward(graphs[0], trace_step(model, a_step(model)))
    for other in graphs[1:]:
        assert not same_forward(graphs[0], other)
        assert not grows_residents(graphs[0], other)


Asked = tuple[nn.Module, Step, Request, Graph, Profile, Planned]


@pytest.fixture(scope="module")
def asked(model: nn.Module, request: pytest.FixtureRequest) -> Asked:
    """A plan by calls of a bare step, and the same step with an optimizer that keeps nothing."""
    whole = make_plan(model, a_step(model), Request(None, "none", "step"))
    budget = Request(int(0.85 * whole.dry.peak_bytes), "calls", "step")
    planned = make_plan(model, a_step(model), budget)
    assert planned.plan.regions
    step = a_step(model, momentum=0.0)
    graph = trace_step(model, step)
    return model, step, budget, graph, build_profile(graph, progress=False), planned


def test_what_still_fits_is_kept(asked: Asked) -> None:
    kept = kept_plan(*asked)
    assert kept is not None
    assert kept.plan == asked[-1].plan
    assert kept.graph is asked[3]


def test_what_was_made_for_another_step_is_not(asked: Asked) -> None:
    model, _, budget, _, _, planned = asked
    smaller = seeded(chain(3, 0.1))()
    step = a_step(smaller)
    graph = trace_step(smaller, step)
    profile = build_profile(graph, progress=False)
    with patch.object(Search, "dry", side_effect=AssertionError):
        assert kept_plan(model, step, budget, graph, profile, planned) is None


def test_what_the_dry_run_finds_too_large_is_not(asked: Asked) -> None:
    most = asked[2].budget_bytes
    assert most is not None
    with patch.object(Search, "peak_bytes", lambda *_: most + 1):
        assert kept_plan(*asked) is None


def test_what_is_priced_too_large_is_not_run_dry(asked: Asked) -> None:
    most = asked[2].budget_bytes
    assert most is not None
    with (
        patch.object(Search, "predicted_bytes", lambda *_: most + 1),
        patch.object(Search, "dry") as dry,
    ):
        assert kept_plan(*asked) is None
    dry.assert_not_called()
