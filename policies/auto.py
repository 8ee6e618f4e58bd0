"""The least predicted time among everything that fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan, Region
from actckpt.policies.blocks import blocks, chains, opened, region
from actckpt.policies.full import full
from actckpt.policies.knapsack import Knapsack
from actckpt.policies.log import halves, log
from actckpt.policies.selective import Selective
from actckpt.policies.sqrt import segments, sqrt
from actckpt.pricing.simulate import Estimate, Pricer
from actckpt.profile import Profile

logger = logging.getLogger("actckpt")

# predictions are not better than that: of two such plans the one with fewer regions is faster
_TIE = 0.01


def auto(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The fastest plan, as priced, that stays within the budget.

    Heuristic: the best of the named policies, of chains cut into equal segments or halves with a
    tail left alone, and of a knapsack over blocks and the results saved inside them (HiGHS), at
    two depths of the module tree.

    Raises:
        BudgetError: none of them fits; ``smallest_bytes`` is the lowest peak among them.
    """
    pricer = Pricer(graph, profile)
    untouched = Plan("none")
    if budget_bytes is None or pricer.estimate(untouched).peak_bytes <= budget_bytes:
        return dataclasses.replace(untouched, policy="auto")
    fitting: list[tuple[float, int, int, Plan]] = []
    smallest: tuple[int, float, Plan] | None = None
    for plan, for_any_budget in _candidates(graph, profile, pricer, budget_bytes):
        price = _priced(pricer, plan)
        if price is None:
            continue
        # the smallest for one budget must be the smallest for every other
        if for_any_budget and (smallest is None or (price.peak_bytes, price.time_s) < smallest[:2]):
            smallest = (price.peak_bytes, price.time_s, plan)
        if price.peak_bytes <= budget_bytes:
            regions = sum(1 for _ in plan.walk())
            fitting.append((price.time_s, regions, price.peak_bytes, plan))
    if not fitting:
        found, _, plan = smallest or (pricer.estimate(untouched).peak_bytes, 0.0, untouched)
        raise BudgetError(
            f"no plan within {budget_bytes} bytes: the smallest peak found is {found}",
            budget_bytes=budget_bytes,
            smallest_bytes=found,
            smallest_plan=dataclasses.replace(plan, policy="auto"),
        )
    within = min(f[0] for f in fitting) * (1 + _TIE)
    best = min((f for f in fitting if f[0] <= within), key=lambda f: (f[1], f[0], f[2]))
    return dataclasses.replace(best[3], policy="auto")


def _priced(pricer: Pricer, plan: Plan) -> Estimate | None:
    try:
        return pricer.estimate(plan)
    except PlanError as error:
        # a shape that this model's stages do not allow is no candidate
        logger.debug("auto: %s", error)
        return None


def _candidates(
    graph: Graph, profile: Profile, pricer: Pricer, budget_bytes: int
) -> Iterator[tuple[Plan, bool]]:
    """Plans to choose from, and whether each would be one under any other budget, too."""
    coarse = blocks(graph)
    fine = _finer(graph, coarse)
    for policy in (full, sqrt, log, Selective()):
        yield policy(graph, profile, None), True
    for level in dict.fromkeys((coarse, fine)):
        knapsack = Knapsack(graph, profile, pricer, level)
        plan = knapsack.least_time(budget_bytes)
        if plan is not None:
            yield plan, False
        yield knapsack.least_memory(), True
        yield from ((plan, True) for plan in _uniform(graph, level))
    yield Plan("", tuple(_nested(graph, b) for b in coarse)), True


def _finer(graph: Graph, coarse: tuple[int, ...]) -> tuple[int, ...]:
    """The calls inside each block instead of the block, where it has some."""
    return tuple(stage for b in coarse for stage in (opened(graph, b) or (b,)))


def _nested(graph: Graph, block: int) -> Region:
    """The block as a region, and within it a region for each call inside, all the way down."""
    inner = tuple(_nested(graph, child) for child in opened(graph, block))
    return region(graph, block, block, *inner)


def _uniform(graph: Graph, level: tuple[int, ...]) -> Iterator[Plan]:
    """Chains in segments of equal length or halved, the last blocks left alone."""
    runs = chains(graph, level)
    longest = max((len(r) for r in runs), default=0)
    if longest < 2:
        return
    lengths = [length for length in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if length <= longest]
    tails = sorted({round(longest * share / 8) for share in range(8)})
    for tail in tails:
        for length in lengths:
            yield Plan("", tuple(_cut(graph, runs, tail, length)))
        yield Plan("", tuple(_halved(graph, runs, tail)))


def _cut(
    graph: Graph, runs: tuple[tuple[int, ...], ...], tail: int, length: int
) -> Iterator[Region]:
    for run in runs:
        kept = run[: max(0, len(run) - tail)] if len(run) > tail else ()
        if kept:
            yield from segments(graph, kept, -(-len(kept) // length))


def _halved(graph: Graph, runs: tuple[tuple[int, ...], ...], tail: int) -> Iterator[Region]:
    for run in runs:
        kept = run[: len(run) - tail] if len(run) > tail else ()
        if kept:
            yield from halves(graph, kept)
