"""What is learned of the backwards of a step: measured, kept across processes, and of several."""

from __future__ import annotations

import logging

import pytest
import torch

import actckpt
from actckpt.session.session import session_of
from actckpt.tracing.backwards import Backward, joined
from tests.test_several_backwards import Tasks, batch, kept, plain, several, total, trained


def test_what_is_measured_are_the_backwards_that_were_seen() -> None:
    torch.manual_seed(0)
    model = Tasks()
    actckpt.optimize(model, 2e-3, batch=batch(), loss_fn=total, policy="calls")
    trained(several, model, 2)
    predicted = actckpt.report(model).planned.predicted.peak_bytes
    measured = actckpt.measure(model, batch(), loss_fn=total, steps=1).peak_bytes
    assert abs(measured - predicted) <= 0.01 * predicted


def test_a_single_backward_is_planned_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Tasks()
    actckpt.optimize(model, 2e-3, batch=batch(), loss_fn=total, policy="calls")
    with caplog.at_level(logging.WARNING, "actckpt"):
        trained(plain, model)
    session = session_of(model)
    assert session is not None
    assert not session.backwards
    assert not kept(caplog)


def test_a_resumed_run_plans_for_them_at_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    first, second = Tasks(), Tasks()
    for model in (first, second):
        actckpt.optimize(model, 2e-3, batch=batch(), loss_fn=total, policy="calls")
    trained(several, first, 2)
    before, after = session_of(first), session_of(second)
    assert before is not None
    assert after is not None
    assert not after.load_state_dict(before.state_dict())
    assert after.backwards == before.backwards != ()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "actckpt"):
        trained(several, second, 1)
    assert not kept(caplog)


def test_steps_that_do_not_all_do_the_same_are_planned_for_all_that_they_do() -> None:
    one = (Backward(keeps=True, returned=("a",), into_grad=False),)
    two = (Backward(keeps=True), Backward(returned=("b",), into_grad=False))
    both = joined(one, two)
    assert both == (
        Backward(keeps=True, returned=("a",)),
        Backward(returned=("b",), into_grad=False),
    )
    assert joined(both, one) == joined(both, two) == both
    assert tuple(Backward.from_json(b.to_json()) for b in both) == both
