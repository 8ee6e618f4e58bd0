"""What a report says to live at an instant is what the dry run saw, to the byte."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Category, Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.planning.dry_run import DryRun
from actckpt.planning.making import make_plan
from actckpt.planning.request import Planned, Request
from actckpt.policies import Policy
from actckpt.reporting.assemble import assemble_report
from actckpt.reporting.report import Report
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import optimizers_of
from actckpt.tracing.step import Step
from tests.burst_plans import made_under


class Blocks(nn.Module):
    """Blocks with dropout, called from a loop; some of what each saves is cheap to make again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.LayerNorm(32)
            )
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def by_operations(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """What the first and the third block make is made again, each at once."""
    return made_under("blocks.0", "blocks.2")(graph)


def planned(policy: str | Policy, scope: str) -> tuple[Planned, Report]:
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(Call.of(torch.randn(256, 32)), optimizers=optimizers_of(optimizer))
    request = Request(None, policy, scope)
    found = make_plan(model, step, request)
    return found, assemble_report(found, request, model="Blocks")


CASES: dict[str, tuple[str | Policy, str]] = {
    "operations-step": (by_operations, "step"),
    "operations-activations": (by_operations, "activations"),
    "calls-activations": ("full", "activations"),
}


@pytest.fixture(scope="module", params=CASES)
def found(request: Any) -> tuple[Planned, Report]:
    return planned(*CASES[request.param])


def test_what_lives_at_the_peak_adds_up_to_it(found: tuple[Planned, Report]) -> None:
    plan, report = found
    expected = plan.dry.peak_bytes if report.scope == "step" else plan.dry.added_bytes
    assert sum(row.bytes for row in report.at_peak) == expected
    assert report.planned.predicted.bounded_bytes(report.scope) == expected
    states = {row.state for row in report.at_peak}
    assert "saved" in states
    assert ("parameters" in states) == (report.scope == "step")
    for row in report.at_peak:
        assert row.recompute_s is None or row.state == "saved"


def test_the_lives_add_up_to_every_level_of_the_dry_run(found: tuple[Planned, Report]) -> None:
    dry: DryRun = found[0].dry
    for instant, levels in enumerate(dry.timeline):
        seen: dict[str, int] = defaultdict(int)
        for life in dry.lives:
            if life.is_at(instant):
                seen[str(life.category_at(instant))] += life.bytes
        assert {k: v for k, v in seen.items() if v} == {
            k: v for k, v in levels.items() if k != "workspace"
        }


def test_the_parts_of_activations_add_up_to_them(found: tuple[Planned, Report]) -> None:
    plan, report = found
    timeline = report.timeline
    assert max(map(sum, zip(*timeline.planned.values(), strict=True))) == plan.dry.peak_bytes
    highest = max(sum(levels.values()) for levels in plan.dry.timeline)
    assert plan.dry.peak_bytes == highest
    untouched = map(sum, zip(*timeline.baseline.values(), strict=True))
    assert max(untouched) == plan.untouched.peak_bytes
    assert not any(timeline.baseline.get("recomputed", ()))
    assert any(timeline.planned["recomputed"])
    again = [", recomputed" in text for text in timeline.planned_running]
    assert any(again)
    assert not any(", recomputed" in text for text in timeline.baseline_running)
    # what was recomputed exists only from a recomputation on
    first = again.index(True)
    assert not any(timeline.planned["recomputed"][:first])


def test_every_operation_of_the_dry_run_is_known(found: tuple[Planned, Report]) -> None:
    plan, _ = found
    course, ops = plan.dry.course, plan.graph.ops
    # the states of generators are tensors, too
    once = [op for op, _, again in course if not again and op >= 0]
    assert once == list(range(len(ops)))
    assert all(ops[op].name == name for op, name, _ in course if op >= 0)
    if plan.plan.bursts:
        again = [op for op, _, again in course if again and op >= 0]
        assert sorted(again) == sorted(op for b in plan.plan.walk_bursts() for op in b.ops)


def test_the_largest_that_live_are_activations_of_that_instant(
    found: tuple[Planned, Report],
) -> None:
    plan, report = found
    graph = plan.graph
    module = "blocks.*"
    at = max(range(len(plan.dry.timeline)), key=lambda i: sum(plan.dry.timeline[i].values()))
    living = report.timeline.planned_living
    assert any(module in one.where for here in living for one in here)
    activations = sum(
        life.bytes
        for life in plan.dry.lives
        if life.is_at(at) and life.category_at(at) is Category.ACTIVATION
    )
    peak = max(
        range(len(living)), key=lambda i: sum(v[i] for v in report.timeline.planned.values())
    )
    assert 0 < sum(one.bytes for one in living[peak]) <= activations
    assert len(graph.ops) > len(living) > 50 or len(living) <= 400


def test_a_report_of_before_is_read() -> None:
    data = planned("full", "step")[1].to_json()
    for name in ("baseline_running", "planned_running", "baseline_living", "planned_living"):
        del data["timeline"][name]
    for name in ("model", "at_peak"):
        del data[name]
    report = actckpt.Report.from_json(data)
    assert report.at_peak == ()
    assert "<svg" in report._repr_html_()
