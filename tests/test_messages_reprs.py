"""What is printed of results, in a notebook or a traceback, is a page."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

import actckpt
from actckpt.data.plan import Burst, Plan, Region
from actckpt.session.session import session_of
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows

pytestmark = pytest.mark.usefixtures("flat_profile")

PAGE_LINES, PAGE_CHARACTERS = 50, 4000


def on_a_page(x: object) -> str:
    text = repr(x)
    assert len(text) <= PAGE_CHARACTERS, f"{type(x).__name__}: {len(text)} characters"
    assert len(text.splitlines()) <= PAGE_LINES
    return text


def test_everything_that_a_plan_consists_of() -> None:
    model = chain(12)()
    actckpt.optimize(model, None, batch=rows(), loss_fn=scalar_loss, policy="full")
    session = session_of(model)
    assert session is not None
    assert session.current is not None
    planned = session.current.planned
    report = actckpt.report(model)
    for found in (planned.dry, planned.program, planned.price, report.timeline):
        on_a_page(found)
    text = on_a_page(report)
    assert text == str(report)
    assert "policy full" in text
    text = on_a_page(planned.graph)
    assert text.startswith("Graph(device='cpu', storages=<")
    assert f"ops=<{len(planned.graph.ops)} Op>" in text
    assert "loss_seen=True" in text
    text = on_a_page(replace(planned.profile, costs=planned.profile.costs * 100))
    assert f"costs=<{len(planned.profile.costs) * 100} Cost>, dispatch_s=" in text


def generated(x: Any) -> str:
    """What a dataclass prints of itself."""
    inside = ", ".join(f"{f.name}={getattr(x, f.name)!r}" for f in fields(x))
    return f"{type(x).__name__}({inside})"


def test_short_plans_are_written_out() -> None:
    plan = Plan("mine", (Region(("h.0", 0), ("h.1", 0)),), ("a note",), (Burst((1, 2), (3,)),))
    assert is_dataclass(plan)
    assert repr(plan) == generated(plan)
    assert eval(repr(plan)) == plan


def test_long_plans_are_counted() -> None:
    regions = tuple(Region((f"h.{n}", 0), (f"h.{n}", 0)) for n in range(60))
    assert on_a_page(Plan("mine", regions)) == (
        "Plan(policy='mine', regions=<60 Region>, notes=(), bursts=())"
    )
    bursts = tuple(Burst(tuple(range(n)), (n,)) for n in range(300))
    assert on_a_page(Plan("mine", notes=("a note",), bursts=bursts)) == (
        "Plan(policy='mine', regions=(), notes=('a note',), bursts=<300 Burst>)"
    )
