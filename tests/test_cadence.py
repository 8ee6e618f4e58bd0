"""When a save is due, by a clock that the test moves."""

from __future__ import annotations

import math

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


@pytest.mark.parametrize("mtbf", ["soon", "0h", 3])
def test_mtbf_is_a_duration(mtbf: str) -> None:
    with pytest.raises(ValueError, match="mtbf must be a duration"):
        Cadence("auto", mtbf)
