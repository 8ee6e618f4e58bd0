"""The best of every plan by operations, for graphs small enough to try them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.interpreting.recomputation import Recomputation
from actckpt.pricing.simulate import Pricer

MOST_RESULTS = 8


def exhaustive(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The fastest of all plans of bursts, none inside another, that stay within the budget.

    A reference for other policies: every subset of the results that can be dropped, cut into bursts
    in the order of their use in backward, reading what autograd saves. Optimal among those, in
    O(3^results) prices.

    Raises:
        BudgetError: none fits.
        PlanError: there are more than eight results to decide on.
    """
    pricer = Pricer(graph, profile)
    order = sorted(
        pricer.possible.saves,
        key=lambda s: min(graph.saves[k].first_use for k in pricer.possible.saves[s]),
    )
    if len(order) > MOST_RESULTS:
        raise PlanError(
            f"{len(order)} results can be recomputed, and every plan is tried only up to "
            f"{MOST_RESULTS}; policy 'optimal' plans for any number"
        )
    best, best_s = None, float("inf")
    smallest, smallest_bytes = None, 0
    for plan in _every_plan(pricer.possible, order):
        price = pricer.estimate(plan)
        if smallest is None or price.peak_bytes < smallest_bytes:
            smallest, smallest_bytes = plan, price.peak_bytes
        fits = budget_bytes is None or price.peak_bytes <= budget_bytes
        if fits and price.time_s < best_s:
            best, best_s = plan, price.time_s
    if best is None:
        raise BudgetError(
            f"no plan within {budget_bytes} bytes: the smallest peak is {smallest_bytes}",
            budget_bytes=budget_bytes,
            smallest_bytes=smallest_bytes,
            smallest_plan=smallest,
        )
    return best


def _every_plan(possible: Recomputation, order: Sequence[int]) -> Iterator[Plan]:
    for size in range(len(order) + 1):
        for chosen in itertools.combinations(order, size):
            for cuts in itertools.product((False, True), repeat=max(0, size - 1)):
                ends = [n for n, cut in enumerate(cuts, 1) if cut]
                groups = [chosen[a:b] for a, b in itertools.pairwise((0, *ends, size)) if a < b]
                bursts = [_burst(possible, group, frozenset(chosen)) for group in groups]
                yield Plan("exhaustive", bursts=tuple(b for b in bursts if b is not None))


def _burst(possible: Recomputation, group: Sequence[int], dropped: frozenset[int]) -> Burst | None:
    """The burst that makes a group again, from what autograd saves and no burst drops."""
    saved = (possible.saves.keys() | possible.stays) - dropped
    closure = possible.closure(group, lambda s: s in saved)
    if closure is None:
        return None
    saves = tuple(sorted(k for s in group for k in possible.saves[s]))
    return Burst(closure[0], saves)
