"""Near-optimal recomputation by operations: column generation, and an integer program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.policies.exhaustive import MOST_RESULTS, exhaustive
from actckpt.policies.solver.burst_choices import burst_choices, priced
from actckpt.policies.solver.columns import Columns
from actckpt.policies.solver.handed_on import leave_ways, ways_given
from actckpt.policies.solver.leveled_choices import LeveledChoices
from actckpt.policies.solver.neighbourhood import improved
from actckpt.policies.solver.packing import Choice, Packing, plan_of
from actckpt.policies.solver.prepared import Prepared, prepared
from actckpt.policies.solver.work import DEFAULT_EFFORT, Work, checked_effort

_ROUNDS = 8
# rounds that together gain less of a step's time, or of its peak, are the last
_PATIENCE = 2
_GAIN = 1e-3
# a plan that takes so much more of a step's time than the linear program is not the last word
_FAR = 0.05
# where no more than this can be gained, a search that began with an earlier one's ways has
# looked far enough, and one among fewer ways is none
_CLOSE = 5e-3
_NEAR = 3e-3
# of a search's work, what may be spent besides to find out whether that is so, and of a step's
# time, what the fastest choices may take for that to be tried
_NEAR_SHARE = 0.25
_NEAR_S = 0.1
_LITTLE = 0.09
# steps that the whole peak costs where nothing fits yet: memory alone counts
_DEAR = 3.0
# counted seconds in which the lowest peak is looked for
_LEAST_S = 6.0
# times the lowest peak at hand: choices that cannot come so near are not looked at further
_HOPELESS = 1.5


@dataclass(frozen=True, slots=True)
class Optimal:
    """The fastest plan of bursts, as priced, that stays within the budget.

    A dynamic program over pieces of the forward has a plan with levels, where there is a chain.
    Per segment (a block, and what runs until the next one) minimum cuts give what to keep from the
    forward pass on. A linear program over all segments, with the memory at every instant as its
    constraint, says what a byte is worth when; small staged programs make the choices that are best
    at those prices, until none is better; an integer program chooses among all of them.
    Where its choices come near the linear program before half of that is done, this is all.
    `actckpt.lower_bound` says how far from the optimum the result can be. For graphs of few results
    every plan of simple bursts is tried as well, and the faster one taken.

    Attributes:
        effort: how long to search once a plan is there, 0 to 20; 1 takes some seconds, whatever the
            budget. What is counted is work, not time: the plan is the same on a busy machine.

    References:
        Gilmore and Gomory 1961, A linear programming approach to the cutting-stock problem (column
        generation).
    """

    effort: float = DEFAULT_EFFORT

    def __post_init__(self) -> None:
        checked_effort(self.effort)

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        """The plan.

        Raises:
            BudgetError: none fits; ``smallest_bytes`` is the lowest peak found.
            PlanError: the forward cannot be followed operation by operation.
        """
        found = by_operations(prepared(graph, profile), budget_bytes, Work.of(self.effort))
        return dataclasses.replace(found, policy="optimal")


def by_operations(tables: Prepared, budget_bytes: int | None, work: Work) -> Plan:
    """As `Optimal`, with the work that is left."""
    pricer = tables.pricer
    if pricer.possible.refusal:
        raise PlanError(f"cannot recompute by operations: {pricer.possible.refusal}")
    untouched = Plan("optimal")
    whole = pricer.estimate(untouched)
    if budget_bytes is None or whole.peak_bytes <= budget_bytes:
        return untouched
    solvers: list[Callable[[], Plan]] = [lambda: by_columns(tables, budget_bytes, work)]
    if len(pricer.possible.saves) <= MOST_RESULTS:
        solvers.append(lambda: exhaustive(tables.graph, tables.profile, budget_bytes))
    found: list[Plan] = []
    errors: list[BudgetError] = []
    for solve in solvers:
        try:
            found.append(solve())
        except BudgetError as error:
            errors.append(error)
    if not found:
        raise min(errors, key=lambda error: error.smallest_bytes or 0)
    return min(found, key=lambda plan: pricer.estimate(plan).time_s)


def by_columns(tables: Prepared, budget_bytes: int, work: Work) -> Plan:
    """The fastest plan that column generation finds within the budget: `Optimal` for any size.

    Where the forward is a chain of pieces, a dynamic program has a plan with levels for every
    budget that it can meet at all: the search begins with that. Else it begins with nothing, and
    has to find out whether there is any.

    Raises:
        BudgetError: none fits; ``smallest_bytes`` is the lowest peak found.
    """
    begun = _begun(tables, budget_bytes, work) if ways_given() else None
    if begun is not None:
        return plan_of(begun)
    alone = Packing(tables.pricer, tables.once(_choices), work=work)
    near: list[Choice] | None = None
    if work.is_left:
        alone, near = _near(alone, budget_bytes)
        if near is not None and not _is_far(alone, near, budget_bytes, _NEAR):
            return plan_of(near)
    levels = tables.once(_levels)
    start = levels.fastest(budget_bytes)
    if start is None and not levels.is_fine:
        return _searched(tables, alone, budget_bytes)
    if start is None:
        start = tables.once(_lowest)[1]
        if alone.estimate(start).peak_bytes > budget_bytes:
            raise _too_small(alone, start, budget_bytes)
    packing = alone.joined_by(levels.near(budget_bytes))
    return plan_of(_faster(packing, start, near, budget_bytes))


def _begun(tables: Prepared, budget_bytes: int, work: Work) -> list[Choice] | None:
    """The fastest choices among the ways of an earlier search and what prices ask for besides.

    None where its ways are of no use here.
    """
    base = tables.pricer.estimate(Plan(""))
    given = (priced(tables.pricer, base, way) for way in ways_given())
    packing = Packing(tables.pricer, [c for c in given if c is not None], work=work)
    columns = Columns(tables.pricer, work)
    found: list[list[Choice]] = []
    for whole in (False, True):
        grown, picked = _picked(packing, columns, budget_bytes, whole=whole)
        if picked is None or _is_far(grown, picked, budget_bytes, _FAR):
            return None
        if not _is_far(grown, picked, budget_bytes, _CLOSE):
            return picked
        found.append(picked)
        packing = grown
    leveled = tables.once(_levels).fastest(budget_bytes)
    found += [] if leveled is None else [leveled]
    return min(found, key=lambda choices: packing.estimate(choices).time_s)


def _near(alone: Packing, budget_bytes: int) -> tuple[Packing, list[Choice] | None]:
    """The packing with what linear programs alone ask for, and the fastest of it or None.

    It is as it was where a step takes much longer: they are hardly ever enough there. None of its
    work is taken.
    """
    work = Work(_NEAR_SHARE * alone.work.allowed_s)
    packing = Packing(alone.pricer, alone.choices, work=work)
    relaxed = packing.relaxation().least_time(budget_bytes)
    if relaxed is None or relaxed.value > _LITTLE * packing.untouched_s:
        return alone, None
    columns = Columns(alone.pricer, work)
    grown, picked = _picked(packing, columns, budget_bytes, whole=False, within_s=_NEAR_S)
    return Packing(alone.pricer, grown.choices, grown.instants, work=alone.work), picked


def _picked(
    packing: Packing,
    columns: Columns,
    budget_bytes: int,
    *,
    whole: bool,
    within_s: float = math.inf,
) -> tuple[Packing, list[Choice] | None]:
    """The packing with what prices ask for, and its fastest choices.

    As it was, and None, where nothing fits without a search for less memory.

    Args:
        within_s: counted seconds in which the choices are made.
    """
    if not packing.choices or packing.relaxation().least_time(budget_bytes) is None:
        return packing, None
    grown = _grown(packing, columns, budget_bytes, whole=whole)
    if grown is None:
        return packing, None
    grown.work.leave(within_s)
    return grown, grown.fastest(budget_bytes)


def _choices(tables: Prepared) -> list[Choice]:
    return burst_choices(tables.profile, tables.pricer)


def _levels(tables: Prepared) -> LeveledChoices:
    return LeveledChoices(tables.pricer)


def _lowest(tables: Prepared) -> tuple[Packing, list[Choice]]:
    """The choices of the lowest peak found, out of which packing; the budget has no part in it.

    Beside the chain's own: where blocks are few, what is kept of each may go lower. Where they are
    many, choices without levels come nowhere near.
    """
    work = Work(_LEAST_S)
    packing = Packing(tables.pricer, tables.once(_choices), work=work)
    leveled = tables.once(_levels).smallest()
    leveled_bytes = packing.estimate(leveled).peak_bytes
    if leveled and _least_bytes(packing) > _HOPELESS * leveled_bytes:
        return packing, leveled
    columns = Columns(tables.pricer, work)
    columns.widen()
    packing = _lowered(packing, columns, 0)
    if leveled and _least_bytes(packing) > leveled_bytes:
        return packing, leveled
    found = [packing.smallest() or [], leveled]
    return packing, min(found, key=lambda choices: packing.estimate(choices).peak_bytes)


def _least_bytes(packing: Packing) -> float:
    """A peak that no choices of a packing go below."""
    relaxed = packing.relaxation().least_peak()
    return math.inf if relaxed is None else relaxed.value


def _faster(
    packing: Packing, start: list[Choice], near: list[Choice] | None, budget_bytes: int
) -> list[Choice]:
    """The fastest choices that are found, none slower than those at hand.

    Args:
        near: of fewer columns, where that was looked for.
    """
    work = packing.work
    if not work.is_left:
        return start
    grown = _grown(packing, Columns(packing.pricer, work), budget_bytes)
    picked = None if grown is None else grown.fastest(budget_bytes)
    found = [choices for choices in (start, near, picked) if choices is not None]
    # of fewer columns; where nothing was found among more, programs are too hard for what is left
    if (
        near is None
        and work.is_left
        and (
            grown is None or (picked is not None and _is_far(packing, picked, budget_bytes, _NEAR))
        )
    ):
        picked = packing.fastest(budget_bytes)
        found += [] if picked is None else [picked]
    return min(found, key=lambda choices: packing.estimate(choices).time_s)


def _searched(tables: Prepared, alone: Packing, budget_bytes: int) -> Plan:
    """As `by_columns`, without a plan to begin with."""
    work = alone.work
    columns = Columns(alone.pricer, work)
    packing = _grown(alone, columns, budget_bytes)
    picked = packing.fastest(budget_bytes) if packing is not None else None
    if packing is not None and picked is not None:
        picked = _nearer(packing, columns, picked, budget_bytes)
        if not work.is_left or not _is_far(packing, picked, budget_bytes, _FAR):
            return plan_of(picked)
    lowest, smallest = tables.once(_lowest)
    found = [] if picked is None else [picked]
    if lowest.estimate(smallest).peak_bytes <= budget_bytes:
        found.append(smallest)
        if work.is_left:
            both = Packing(alone.pricer, lowest.choices, lowest.instants, work=work)
            known = {choice.parts for choice in lowest.choices}
            both = both.joined_by([c for c in (packing or alone).choices if c.parts not in known])
            start = both.fastest(budget_bytes) or smallest
            found.append(_nearer(both, columns, start, budget_bytes))
    if found:
        return plan_of(min(found, key=lambda choices: lowest.estimate(choices).time_s))
    raise _too_small(lowest, smallest, budget_bytes)


def _too_small(packing: Packing, smallest: Sequence[Choice], budget_bytes: int) -> BudgetError:
    smallest_bytes = packing.estimate(smallest).peak_bytes
    return BudgetError(
        f"no plan within {budget_bytes} bytes: the smallest peak found is {smallest_bytes}",
        budget_bytes=budget_bytes,
        smallest_bytes=smallest_bytes,
        smallest_plan=dataclasses.replace(plan_of(smallest), policy="optimal"),
    )


def _nearer(
    packing: Packing, columns: Columns, picked: list[Choice], budget_bytes: int
) -> list[Choice]:
    """Choices that fit, made better where they are far from the linear program."""
    if not packing.work.is_left or not _is_far(packing, picked, budget_bytes, _FAR):
        return picked
    return improved(packing, columns, picked, budget_bytes)


def _is_far(packing: Packing, picked: Sequence[Choice], budget_bytes: int, share: float) -> bool:
    """Whether choices take more than the linear program by so much of a step's time."""
    relaxed = packing.relaxation().least_time(budget_bytes)
    least_s = relaxed.value if relaxed is not None else 0.0
    return sum(c.time_s for c in picked) - least_s > share * packing.untouched_s


def _grown(
    packing: Packing, columns: Columns, budget_bytes: int, *, whole: bool = True
) -> Packing | None:
    """The packing with what the budget's prices ask for; None if nothing brings it within.

    Args:
        whole: else of what linear programs find, alone.
    """
    within = packing
    relaxed = within.relaxation().least_time(budget_bytes)
    while relaxed is None:
        within = _lowered(packing, columns, budget_bytes)
        relaxed = within.relaxation().least_time(budget_bytes)
        if relaxed is None and not (packing.work.is_left and columns.widen()):
            return None
    # linear programs first, which are cheap; whole ones ask for what these have missed
    for exactly in (False, True) if whole else (False,):
        patience = 1 if exactly else _PATIENCE
        reached_s = [math.inf] * patience
        for _ in range(_ROUNDS):
            worth_s = _GAIN * columns.base.time_s
            if relaxed is None or relaxed.value > reached_s[-patience] - worth_s:
                break
            reached_s.append(relaxed.value)
            if not packing.work.is_left:
                break
            fresh = columns.at(relaxed.prices, within.choices, whole=exactly)
            if not fresh:
                break
            within = within.joined_by(fresh)
            relaxed = within.relaxation().least_time(budget_bytes)
    if relaxed is None:
        return None
    order = np.argsort(relaxed.reduced[: len(within.choices)], kind="stable")
    leave_ways(within.choices[j].parts for j in order)
    if not packing.work.is_left:
        return within
    return within.joined_by(columns.near(relaxed.prices, within.choices, whole=whole))


def _lowered(packing: Packing, columns: Columns, enough_bytes: int) -> Packing:
    """The packing with what lowers its peak, until that is low enough or nothing helps."""
    reached_bytes = [math.inf] * _PATIENCE
    whole = columns.base
    for _ in range(_ROUNDS):
        relaxed = packing.relaxation().least_peak()
        if relaxed is None or relaxed.value <= enough_bytes or not packing.work.is_left:
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
