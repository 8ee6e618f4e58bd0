"""By operations where the forward can be followed and that fits, else by calls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.policies.by_calls import at_hand_by_calls, by_calls
from actckpt.policies.optimal import by_operations
from actckpt.policies.solver.prepared import Prepared, prepared
from actckpt.policies.solver.work import DEFAULT_EFFORT, Work, checked_effort

# an overhead beyond which regions in regions may be faster
_DEAR = 0.25


@dataclass(frozen=True, slots=True)
class Auto:
    """The plan of `Optimal`, or of `ByCalls` where there is none.

    Regions in regions reach below what bursts do, and are tried where those cost much.

    Attributes:
        effort: how long to search once a plan is there, 0 to 20; as of `Optimal`.
    """

    effort: float = DEFAULT_EFFORT

    def __post_init__(self) -> None:
        checked_effort(self.effort)

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        """The plan.

        Raises:
            BudgetError: neither fits; ``smallest_bytes`` is the lowest peak of both.
        """
        tables, work = prepared(graph, profile), Work.of(self.effort)
        smallest: BudgetError | None = None
        try:
            plan = by_operations(tables, budget_bytes, work)
        except PlanError:
            pass  # it cannot be followed
        except BudgetError as error:
            smallest = error
        else:
            return dataclasses.replace(_faster(tables, budget_bytes, plan, work), policy="auto")
        try:
            plan = by_calls(tables, budget_bytes, work)
        except BudgetError as error:
            if (
                smallest is None
                or smallest.smallest_bytes is None
                or error.smallest_bytes is None
                or error.smallest_bytes <= smallest.smallest_bytes
            ):
                raise
            raise smallest from None
        return dataclasses.replace(plan, policy="auto")


def _faster(tables: Prepared, budget_bytes: int | None, plan: Plan, work: Work) -> Plan:
    """The plan, or one by calls where that is faster even if following cost nothing.

    Where operations are small, steps show less of following than is priced and more of replaying
    modules: plans by calls that were priced up to 7 points below took 2 to 9 points longer.
    """
    pricer = tables.pricer
    whole_s = pricer.estimate(Plan("")).time_s
    price = pricer.estimate(plan)
    if price.time_s - whole_s <= _DEAR * whole_s:
        return plan
    other = at_hand_by_calls(tables, budget_bytes, work)
    if other is None:
        return plan
    return other if pricer.estimate(other).time_s < price.time_s - price.following_s else plan
