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

# an overhead beyond which regions in regions may be faster, and what following may cost before
# regions, which need none, may be
_DEAR = 0.25
_DEAR_TO_FOLLOW = 0.015


def auto(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The plan of `optimal`, or of `by_calls` where there is none.

    Regions in regions reach below what bursts do, and are tried where those cost much; so are
    regions where following the forward costs much, as it does in small operations.

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
    """The plan, or one by calls where that is faster."""
    pricer = Pricer(graph, profile)
    whole_s = pricer.estimate(Plan("")).time_s
    price = pricer.estimate(plan)
    dear = price.time_s - whole_s > _DEAR * whole_s
    if dear or price.following_s > _DEAR_TO_FOLLOW * whole_s:
        try:
            other = by_calls(graph, profile, budget_bytes)
        except BudgetError:
            other = plan
        plan = other if pricer.estimate(other).time_s < price.time_s else plan
    return dataclasses.replace(plan, policy="auto")
