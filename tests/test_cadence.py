"""When a save is due, by a clock that the test moves."""

from __future__ import annotations

import math
from typing import Any

import pytest

from actckpt.resuming.cadence import Cadence


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_auto_follows_young_and_daly() -> None:
    clock = Clock()
    cadence = Cadence("auto", "1h", clock)
    assert cadence.interval_s is None
    assert cadence.due(1)  # which measures
    cadence.began(0.5)
    interval_s = math.sqrt(2 * 0.5 * 3600)
    assert cadence.interval_s == pytest.approx(interval_s)
    assert interval_s == 60
    clock.now_s = 59.9
    assert not cadence.due(2)
    clock.now_s = 60
    assert cadence.due(3)
    cadence.began(0.125)  # a quarter of the cost: half the time
    clock.now_s = 89.9
    assert not cadence.due(4)
    clock.now_s = 90
    assert cadence.due(5)


def test_auto_is_no_shorter_than_a_save_takes() -> None:
    clock = Clock()
    cadence = Cadence("auto", "1h", clock)
    cadence.began(0.5)
    cadence.ended(200)
    clock.now_s = 199
    assert not cadence.due(1)
    clock.now_s = 200
    assert cadence.due(2)
    cadence.ended(20)  # the disk is faster again
    assert cadence.interval_s == 60


def test_durations_and_restarts() -> None:
    clock = Clock()
    cadence = Cadence("1.5min", clock=clock)
    cadence.began(1000)  # its cost does not matter
    clock.now_s = 80
    cadence.restart()
    clock.now_s = 169
    assert not cadence.due(1)
    clock.now_s = 170
    assert cadence.due(2)
    assert not Cadence(None, clock=clock).due(0)


@pytest.mark.parametrize(
    ("every", "interval_s"),
    [
        ("10 minutes", 600), ("10min", 600), ("30s", 30), ("90 sec", 90), ("1.5h", 5400),
        ("1d", 86400), ("2 days", 172800), ("1 Hour", 3600), ("45 mins", 2700), (".5 hr", 1800),
    ],
)  # fmt: skip
def test_how_durations_are_written(every: str, interval_s: float) -> None:
    assert Cadence(every).interval_s == interval_s


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("epochs", "found 'epochs'. For a save at the end of each epoch of run.steps"),
        ("2 epochs", 'pass every="epoch"'),
        ("500 steps", "Steps are a number alone: every=500"),
        ("500", "Steps are a number alone: every=500"),
        ("10 parsecs", 'a duration such as "10 minutes" or "1d", "auto", steps as a list'),
        (0, "found 0"),
        (2.5, "found 2.5"),
        (True, "found True"),
    ],
)
def test_what_no_interval_is_answered_with(every: Any, said: str) -> None:
    with pytest.raises(ValueError, match="every must be a number of steps, ") as caught:
        Cadence(every)
    assert said in str(caught.value)


@pytest.mark.parametrize("mtbf", ["soon", "0h", 3])
def test_mtbf_is_a_duration(mtbf: str) -> None:
    with pytest.raises(ValueError, match="mtbf must be a duration"):
        Cadence("auto", mtbf)
