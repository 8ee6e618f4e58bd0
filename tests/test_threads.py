"""Programs solved side by side: the same answers in the same order, whatever the cores."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from actckpt.data.plan import Plan
from actckpt.policies.optimal import by_columns
from actckpt.policies.solver import threads
from actckpt.policies.solver.prepared import Prepared
from actckpt.policies.solver.threads import in_threads
from actckpt.policies.solver.work import DEFAULT_EFFORT, Work
from tests.predictions import prepared


def test_answers_come_in_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    seen: set[int] = set()

    def call(n: int) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.02 * (3 - n % 4))  # the first of each four ends last
        return n

    assert in_threads([partial(call, n) for n in range(12)]) == list(range(12))
    assert 1 < len(seen) <= 4
    assert threading.get_ident() not in seen
    assert in_threads([]) == []


def test_one_core_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 1)
    assert in_threads([threading.get_ident] * 3) == [threading.get_ident()] * 3


def test_an_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 2)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads([fail, lambda: None])


@pytest.mark.parametrize("name", ["bert", "unet"])
def test_a_plan_does_not_depend_on_the_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = prepared(name)
    budget_bytes = int(0.6 * subject.pricer.estimate(Plan("none")).peak_bytes)
    plans = []
    for cores in (1, 3):
        monkeypatch.setattr(threads, "_cores", lambda cores=cores: cores)
        plans.append(
            by_columns(
                Prepared(subject.graph, subject.profile), budget_bytes, Work.of(DEFAULT_EFFORT)
            )
        )
    assert plans[0].bursts
    assert plans[0] == plans[1]
