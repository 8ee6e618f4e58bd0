"""By operations where the forward can be followed and that fits, else by calls."""

from __future__ import annotations

import dataclasses

from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.policies.by_calls import by_calls
from actckpt.policies.optimal import optimal
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile

# an overhead beyond which regions in regions may be faster
_DEAR = 0.25


def auto(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The plan of `optimal`, or of `by_calls` where there is none.

    Regions in regions reach below what bursts do, and are tried where those cost much.

    Raises:
        BudgetError: neither fits; ``smallest_bytes`` is the lowest peak of both.
    """
    smallest: BudgetError | None = None
    try:
        return _faster(graph, profile, budget_bytes, optimal(graph, profile, budget_bytes))
    except PlanError:
        pass  # it cannot be followed
    except BudgetError as error:
        smallest = error
    try:
        return dataclasses.replace(by_calls(graph, profile, budget_bytes), policy="auto")
    except BudgetError as error:
        if (
            smallest is None
            or smallest.smallest_bytes is None
            or error.smallest_bytes is None
            or error.smallest_bytes <= smallest.smallest_bytes
        ):
            raise
        raise smallest from None


def _faster(graph: Graph, profile: Profile, budget_bytes: int | None, plan: Plan) -> Plan:
    """The plan, or one by calls where that is faster even if following cost nothing.

    Where operations are small, steps show less of following than is priced and more of replaying
    modules: plans by calls that were priced up to 7 points below took 2 to 9 points longer.
    """
    pricer = Pricer(graph, profile)
    whole_s = pricer.estimate(Plan("")).time_s
    price = pricer.estimate(plan)
    if price.time_s - whole_s > _DEAR * whole_s:
        try:
            other = by_calls(graph, profile, budget_bytes)
        except BudgetError:
            other = plan
        faster = pricer.estimate(other).time_s < price.time_s - price.following_s
        plan = other if faster else plan
    return dataclasses.replace(plan, policy="auto")
