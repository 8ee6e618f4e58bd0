"""Near-optimal recomputation by operations: cuts of every segment, packed by an integer program."""

from __future__ import annotations

import dataclasses

from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.policies.burst_choices import burst_choices
from actckpt.policies.exhaustive import MOST_RESULTS, exhaustive
from actckpt.policies.packing import Packing
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile

# segments that are recomputed together; more are tried where fewer do not fit
_LONGEST = (1, 3)


def optimal(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The fastest plan of bursts, as priced, that stays within the budget.

    Per segment (a block, and what runs until the next one) minimum cuts give what to keep from the
    forward pass on, and what to hold from the moment when backward gets there; an integer program
    over all segments chooses among them, with the memory at every instant as its constraint.
    `actckpt.lower_bound` says how far from the optimum the result can be. Graphs of few results are
    solved by trying every plan.

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
    if len(pricer.possible.saves) <= MOST_RESULTS:
        return dataclasses.replace(exhaustive(graph, profile, budget_bytes), policy="optimal")
    smallest, smallest_bytes = untouched, whole.peak_bytes
    for longest in _LONGEST:
        packing = Packing(pricer, burst_choices(profile, pricer, longest))
        plan = packing.least_time(budget_bytes)
        if plan is not None:
            return dataclasses.replace(plan, policy="optimal")
        least = packing.least_memory(smallest_bytes)
        if least is not None and (peak := pricer.estimate(least).peak_bytes) < smallest_bytes:
            smallest, smallest_bytes = dataclasses.replace(least, policy="optimal"), peak
        if smallest_bytes <= budget_bytes:
            return smallest
    raise BudgetError(
        f"no plan within {budget_bytes} bytes: the smallest peak found is {smallest_bytes}",
        budget_bytes=budget_bytes,
        smallest_bytes=smallest_bytes,
        smallest_plan=smallest,
    )
