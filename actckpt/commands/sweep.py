"""Every policy at every budget: planned, and measured beside the untouched model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from actckpt.data.budget_error import BudgetError
from actckpt.data.plan import Plan
from actckpt.reporting.measurement import Measurement

# budgets between the smallest plan and the untouched model, where none are given
BUDGETS = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one budget.

    Args:
        percent: the budget as a share of the untouched peak.
        smallest_bytes: where the budget cannot be met: the smallest that can.
        predicted_bytes: what a budget of that scope is compared with, like ``measured_bytes``.
        ratio: planned over untouched step time, the median over rounds of one step of each.
    """

    policy: str
    percent: float
    budget_bytes: int
    fits: bool
    smallest_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    step_s: float | None = None
    untouched_step_s: float | None = None
    ratio: float | None = None
    regions: int | None = None
    plan_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A plan beside the untouched model."""

    planned_bytes: int
    step_s: float
    untouched_step_s: float
    ratio: float


def bounded(measurement: Measurement, scope: str) -> int:
    """What a budget of that scope is compared with."""
    return measurement.added_bytes if scope == "activations" else measurement.peak_bytes


def pair(rounds: Sequence[tuple[Measurement, Measurement]], scope: str) -> Pair:
    """What rounds of one (planned, untouched) step each amount to: the highest peak, medians."""
    return Pair(
        planned_bytes=max(bounded(planned, scope) for planned, _ in rounds),
        step_s=median(planned.step_s for planned, _ in rounds),
        untouched_step_s=median(untouched.step_s for _, untouched in rounds),
        ratio=median(planned.step_s / untouched.step_s for planned, untouched in rounds),
    )


def percents_between(smallest_bytes: int, whole_bytes: int) -> list[float]:
    """Budgets in percent of ``whole_bytes``, the highest first, the last the smallest that fits.

    The untouched model itself, which every policy fits, is none of them.
    """
    smallest = min(math.ceil(1000 * smallest_bytes / whole_bytes) / 10, 100.0)
    steps = [smallest + (100 - smallest) * n / BUDGETS for n in range(BUDGETS)]
    return list(dict.fromkeys(round(percent, 1) for percent in reversed(steps)))


def sweep(
    policies: Sequence[str],
    percents: Sequence[float],
    whole_bytes: int,
    *,
    planned: Callable[[str, int], tuple[Plan, int | None]],
    measured: Callable[[], Pair],
    reverted: Callable[[], Any],
    progress: Callable[[str], Any],
) -> Iterator[Row]:
    """A row for every policy at every budget, each plan measured once, beside the untouched step.

    Args:
        percents: budgets in percent of ``whole_bytes``.
        planned: plans the model and returns the plan and the predicted bytes.
        measured: measures the model as it is, and an untouched one.
        reverted: makes the model untouched.
    """
    for policy in policies:
        known: dict[Plan, Pair] = {}
        for percent in percents:
            budget_bytes = int(whole_bytes * percent / 100)
            row = Row(policy, percent, budget_bytes, fits=False)
            progress(f"{policy} at {percent:g} %")
            reverted()
            start = time.perf_counter()
            try:
                plan, predicted_bytes = planned(policy, budget_bytes)
            except BudgetError as error:
                yield replace(row, smallest_bytes=error.smallest_bytes)
                continue
            plan_s = time.perf_counter() - start
            if plan not in known:
                known[plan] = measured()
            found = known[plan]
            yield replace(
                row,
                fits=True,
                predicted_bytes=predicted_bytes,
                measured_bytes=found.planned_bytes,
                step_s=found.step_s,
                untouched_step_s=found.untouched_step_s,
                ratio=found.ratio,
                regions=len(list(plan.walk())) + len(list(plan.walk_bursts())),
                plan_s=plan_s,
            )
    reverted()
