"""Near-optimal recomputation by operations: column generation, and an integer program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.policies.burst_choices import burst_choices
from actckpt.policies.columns import Columns
from actckpt.policies.exhaustive import MOST_RESULTS, exhaustive
from actckpt.policies.neighbourhood import improved
from actckpt.policies.packing import Choice, Packing, plan_of
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile

_ROUNDS = 8
# rounds that together gain less of a step's time, or of its peak, are the last
_PATIENCE = 2
_GAIN = 1e-3
# a plan that takes so much more of a step's time than the linear program is not the last word
_FAR = 0.05
# steps that the whole peak costs where nothing fits yet: memory alone counts
_DEAR = 3.0


def optimal(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The fastest plan of bursts, as priced, that stays within the budget.

    Per segment (a block, and what runs until the next one) minimum cuts give what to keep from the
    forward pass on. A linear program over all segments, with the memory at every instant as its
    constraint, says what a byte is worth when; small staged programs make the choices that are best
    at those prices, until none is better; an integer program chooses among all of them.
    `actckpt.lower_bound` says how far from the optimum the result can be. For graphs of few results
    every plan of simple bursts is tried as well, and the faster one taken.

    References:
        Gilmore and Gomory 1961, A linear programming approach to the cutting-stock problem (column
        generation).

    Raises:
        BudgetError: none fits; ``smallest_bytes`` is the lowest peak found.
        PlanError: the forward cannot be followed operation by operation.
    """
    pricer = Pricer(graph, profile)
    if pricer.possible.refusal:
        raise PlanError(f"cannot recompute by operations: {pricer.possible.refusal}")
    untouched = Plan("optimal")
    whole = pricer.estimate(untouched)
    if budget_bytes is None or whole.peak_bytes <= budget_bytes:
        return untouched
    solvers: list[Callable[[Graph, Profile, int], Plan]] = [by_columns]
    if len(pricer.possible.saves) <= MOST_RESULTS:
        solvers.append(exhaustive)
    found: list[Plan] = []
    errors: list[BudgetError] = []
    for solve in solvers:
        try:
            found.append(solve(graph, profile, budget_bytes))
        except BudgetError as error:
            errors.append(error)
    if not found:
        raise min(errors, key=lambda error: error.smallest_bytes or 0)
    best = min(found, key=lambda plan: pricer.estimate(plan).time_s)
    return dataclasses.replace(best, policy="optimal")


def by_columns(graph: Graph, profile: Profile, budget_bytes: int) -> Plan:
    """The fastest plan that column generation finds within the budget: `optimal` for any size.

    Raises:
        BudgetError: none fits; ``smallest_bytes`` is the lowest peak found.
    """
    pricer = Pricer(graph, profile)
    columns = Columns(pricer)
    alone = Packing(pricer, burst_choices(profile, pricer))
    packing = _grown(alone, columns, budget_bytes)
    picked = packing.fastest(budget_bytes) if packing is not None else None
    if packing is not None and picked is not None:
        picked = _nearer(packing, columns, picked, budget_bytes)
        if not _is_far(packing, picked, budget_bytes):
            return plan_of(picked)
    # anew, so that the smallest for one budget is the smallest for every other
    again = Columns(pricer)
    again.widen()
    lowest = _lowered(alone.anew(), again, 0)
    smallest = lowest.smallest() or []
    smallest_bytes = lowest.estimate(smallest).peak_bytes
    found = [] if picked is None else [picked]
    if smallest_bytes <= budget_bytes:
        known = {choice.parts for choice in lowest.choices}
        fresh = [c for c in (packing or alone).choices if c.parts not in known]
        both = lowest.joined_by(fresh)
        start = both.fastest(budget_bytes) or smallest
        found.append(_nearer(both, again, start, budget_bytes))
    if found:
        return plan_of(min(found, key=lambda choices: lowest.estimate(choices).time_s))
    raise BudgetError(
        f"no plan within {budget_bytes} bytes: the smallest peak found is {smallest_bytes}",
        budget_bytes=budget_bytes,
        smallest_bytes=smallest_bytes,
        smallest_plan=dataclasses.replace(plan_of(smallest), policy="optimal"),
    )


def _nearer(
    packing: Packing, columns: Columns, picked: list[Choice], budget_bytes: int
) -> list[Choice]:
    """Choices that fit, made better where they are far from the linear program."""
    if not _is_far(packing, picked, budget_bytes):
        return picked
    return improved(packing, columns, picked, budget_bytes)


def _is_far(packing: Packing, picked: Sequence[Choice], budget_bytes: int) -> bool:
    """Whether choices are so far from the linear program that others may well be better."""
    relaxed = packing.relaxation().least_time(budget_bytes)
    least_s = relaxed.value if relaxed is not None else 0.0
    return sum(c.time_s for c in picked) - least_s > _FAR * packing.untouched_s


def _grown(packing: Packing, columns: Columns, budget_bytes: int) -> Packing | None:
    """The packing with what the budget's prices ask for; None if nothing brings it within."""
    within = packing
    relaxed = within.relaxation().least_time(budget_bytes)
    while relaxed is None:
        within = _lowered(packing, columns, budget_bytes)
        relaxed = within.relaxation().least_time(budget_bytes)
        if relaxed is None and not columns.widen():
            return None
    reached_s = [math.inf] * _PATIENCE
    for _ in range(_ROUNDS):
        if relaxed is None or relaxed.value > reached_s[-_PATIENCE] - _GAIN * columns.base.time_s:
            break
        reached_s.append(relaxed.value)
        fresh = columns.at(relaxed.prices, within.choices)
        if not fresh:
            break
        within = within.joined_by(fresh)
        relaxed = within.relaxation().least_time(budget_bytes)
    if relaxed is None:
        return None
    return within.joined_by(columns.near(relaxed.prices, within.choices))


def _lowered(packing: Packing, columns: Columns, enough_bytes: int) -> Packing:
    """The packing with what lowers its peak, until that is low enough or nothing helps."""
    reached_bytes = [math.inf] * _PATIENCE
    whole = columns.base
    for _ in range(_ROUNDS):
        relaxed = packing.relaxation().least_peak()
        if relaxed is None or relaxed.value <= enough_bytes:
            break
        if relaxed.value > reached_bytes[-_PATIENCE] - _GAIN * whole.peak_bytes:
            break
        reached_bytes.append(relaxed.value)
        dear_s = _DEAR * whole.time_s / whole.peak_bytes
        prices = {at: price * dear_s for at, price in relaxed.prices.items()}
        fresh = columns.at(prices, packing.choices)
        if not fresh:
            break
        packing = packing.joined_by(fresh)
    return packing
