"""Win, tie and loss in `experiments.peers`."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.peers.verdict import (
    LOSS,
    TIE,
    WIN,
    at_its_peak,
    at_its_time,
    noise,
    plan_at_its_time,
)


def _plan(peak_bytes: int, over_peer: float) -> dict[str, Any]:
    return {"status": "measured", "peak_bytes": peak_bytes, "over_peer": {"median": over_peer}}


def _row(at_peak: dict[str, Any], at_time: dict[str, Any]) -> dict[str, Any]:
    return {
        "peak_bytes": 1000,
        "again_over_untouched": {"median": 1.01, "low": 0.99, "high": 1.03},
        "ours_at_its_peak": at_peak,
        "ours_at_its_time": at_time,
    }


def test_noise_is_what_two_equal_arms_differ_by() -> None:
    assert noise(_row({}, {})) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("peak_bytes", "over_peer", "expected"),
    [(1000, 0.97, WIN), (1005, 0.99, TIE), (990, 1.015, TIE), (900, 1.03, LOSS), (1020, 0.5, LOSS)],
)
def test_at_its_peak(peak_bytes: int, over_peer: float, expected: str) -> None:
    assert at_its_peak(_row(_plan(peak_bytes, over_peer), {})) == expected


@pytest.mark.parametrize(
    ("peak_bytes", "over_peer", "expected"),
    [(900, 1.01, WIN), (995, 0.8, TIE), (1100, 0.9, LOSS), (500, 1.03, LOSS)],
)
def test_at_its_time(peak_bytes: int, over_peer: float, expected: str) -> None:
    slow = _plan(1000, 1.5)
    assert at_its_time(_row(slow, _plan(peak_bytes, over_peer))) == expected


def test_the_plan_at_its_peak_counts_at_its_time_where_it_is_as_fast() -> None:
    row = _row(_plan(995, 0.95), _plan(1100, 0.9))
    assert plan_at_its_time(row)["peak_bytes"] == 995
    assert at_its_time(row) == TIE


def test_a_plan_that_failed_is_a_loss() -> None:
    failed = {"status": "failed: BudgetError"}
    row = _row(failed, failed)
    assert (at_its_peak(row), at_its_time(row)) == (LOSS, LOSS)
