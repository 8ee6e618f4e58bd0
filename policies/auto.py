"""By operations where the forward can be followed and that fits, else by calls."""

from __future__ import annotations

import dataclasses

from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.policies.by_calls import by_calls
from actckpt.policies.optimal import optimal
from actckpt.profile import Profile


def auto(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The plan of `optimal`, or of `by_calls` where there is none.

    Regions in regions reach below what bursts do.

    Raises:
        BudgetError: neither fits; ``smallest_bytes`` is the lowest peak of both.
    """
    smallest: BudgetError | None = None
    try:
        return dataclasses.replace(optimal(graph, profile, budget_bytes), policy="auto")
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
