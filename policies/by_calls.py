"""The least predicted time among everything that recomputes by calls and fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan, Region
from actckpt.policies.blocks import blocks, chains, opened, region
from actckpt.policies.call_choices import call_choices
from actckpt.policies.full import full
from actckpt.policies.log import halves, log
from actckpt.policies.packing import Packing
from actckpt.policies.selective import Selective
from actckpt.policies.sqrt import segments, sqrt
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile

logger = logging.getLogger("actckpt")

# predictions are not better than that: of two such plans the one with fewer regions is faster
_TIE = 0.01


def by_calls(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The fastest plan of regions, as priced, that stays within the budget.

    For batches of changing shapes, and for forwards that change from step to step: a region runs
    the module's Python again, whatever it does. Heuristic: the best of the named policies, of
    chains cut into equal segments or halves with a tail left alone, and of a packing of regions of
    every size.

    Raises:
        BudgetError: none of them fits; ``smallest_bytes`` is the lowest peak among them.
    """
    pricer = Pricer(graph, profile)
    untouched = Plan("none")
    if budget_bytes is None or pricer.estimate(untouched).peak_bytes <= budget_bytes:
        return dataclasses.replace(untouched, policy="calls")
    packing = Packing(pricer, call_choices(graph, profile, pricer))
    priced = _priced(pricer, _simple(graph, profile))
    fastest = packing.least_time(budget_bytes)
    fitting = [c for c in priced if c.peak_bytes <= budget_bytes]
    if fastest is not None:
        fitting.extend(_priced(pricer, (fastest,)))
    if not fitting:
        # the smallest for one budget is the smallest for every other: the budget has no part in it
        candidates = [*priced, *_priced(pricer, (untouched,))]
        candidates += _priced(pricer, (packing.least_memory(),))
        smallest = min(candidates, key=lambda c: (c.peak_bytes, c.time_s))
        if smallest.peak_bytes > budget_bytes:
            raise BudgetError(
                f"no plan within {budget_bytes} bytes: the smallest peak found is "
                f"{smallest.peak_bytes}",
                budget_bytes=budget_bytes,
                smallest_bytes=smallest.peak_bytes,
                smallest_plan=dataclasses.replace(smallest.plan, policy="calls"),
            )
        fitting = [smallest]
    within = min(c.time_s for c in fitting) * (1 + _TIE)
    best = min(
        (c for c in fitting if c.time_s <= within),
        key=lambda c: (c.regions, c.time_s, c.peak_bytes),
    )
    return dataclasses.replace(best.plan, policy="calls")


@dataclass(frozen=True, slots=True)
class _Candidate:
    plan: Plan
    peak_bytes: int
    time_s: float

    @property
    def regions(self) -> int:
        return sum(1 for _ in self.plan.walk())


def _priced(pricer: Pricer, plans: Iterable[Plan | None]) -> list[_Candidate]:
    found = []
    for plan in plans:
        if plan is None:
            continue
        try:
            price = pricer.estimate(plan)
        except PlanError as error:
            # a shape that this model's stages do not allow is no candidate
            logger.debug("calls: %s", error)
            continue
        found.append(_Candidate(plan, price.peak_bytes, price.time_s))
    return found


def _simple(graph: Graph, profile: Profile) -> Iterator[Plan]:
    """The named policies' plans, uniform ones, and every block nested all the way down."""
    coarse = blocks(graph)
    fine = _finer(graph, coarse)
    for policy in (full, sqrt, log, Selective()):
        yield policy(graph, profile, None)
    for level in dict.fromkeys((coarse, fine)):
        yield from _uniform(graph, level)
    yield Plan("", tuple(_nested(graph, b) for b in coarse))


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
