"""Win, tie or loss of a plan against a peer, given how much two equal arms differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIN, TIE, LOSS = "win", "tie", "loss"
# peaks do not vary from step to step; plans aim at 99.5 % of a budget
SAME_PEAK = 0.01


def noise(row: Mapping[str, Any]) -> float:
    """How far from 1 a ratio of equal arms is: half its interquartile range, or its median."""
    again = row["again_over_untouched"]
    off: float = abs(again["median"] - 1)
    spread: float = (again["high"] - again["low"]) / 2
    return max(off, spread)


def at_its_peak(row: Mapping[str, Any]) -> str:
    """By time, if the plan's peak is the peer's at most."""
    ours = row["ours_at_its_peak"]
    if ours["status"] != "measured":
        return LOSS
    if ours["peak_bytes"] > (1 + SAME_PEAK) * row["peak_bytes"]:
        return LOSS
    return _side(ours["over_peer"]["median"] - 1, noise(row))


def at_its_time(row: Mapping[str, Any]) -> str:
    """By peak, if a plan is as fast as the peer."""
    ours = plan_at_its_time(row)
    if ours["status"] != "measured" or not _as_fast(ours, row):
        return LOSS
    return _side(ours["peak_bytes"] / row["peak_bytes"] - 1, SAME_PEAK)


def plan_at_its_time(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plan of the lower peak that was measured to be as fast as the peer: the one predicted to
    be, or the one at the peer's peak; the predicted one where neither was."""
    found: list[Mapping[str, Any]] = [row["ours_at_its_time"], row["ours_at_its_peak"]]
    fast = [ours for ours in found if ours["status"] == "measured" and _as_fast(ours, row)]
    return min(fast, key=lambda ours: ours["peak_bytes"]) if fast else found[0]


def _as_fast(ours: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    median: float = ours["over_peer"]["median"]
    return median <= 1 + noise(row)


def _side(difference: float, tolerance: float) -> str:
    if abs(difference) <= tolerance:
        return TIE
    return WIN if difference < 0 else LOSS
