"""The least predicted time among everything that recomputes by calls and fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.policies.blocks import blocks, chains, opened, region
from actckpt.policies.full import full
from actckpt.policies.log import halves, log
from actckpt.policies.selective import Selective
from actckpt.policies.solver.block_chain import BlockChain
from actckpt.policies.solver.call_choices import call_choices
from actckpt.policies.solver.chain_plans import ChainPlans, chain_plans, plan_of_parts
from actckpt.policies.solver.packing import Choice, Packing
from actckpt.policies.solver.prepared import Prepared, prepared
from actckpt.policies.solver.work import DEFAULT_EFFORT, Work, checked_effort
from actckpt.policies.sqrt import segments, sqrt
from actckpt.pricing.simulate import Pricer

logger = logging.getLogger("actckpt")

# predictions are not better than that: of two such plans the one with fewer regions is faster
_TIE = 0.01
# counted seconds in which the lowest peak is looked for
_LEAST_S = 2.0


@dataclass(frozen=True, slots=True)
class ByCalls:
    """The fastest plan of regions, as priced, that stays within the budget.

    For batches of changing shapes, and for forwards that change from step to step: a region runs
    the module's Python again, whatever it does. Heuristic: the best of the named policies, of
    chains cut into equal segments or halves with a tail left alone, of a packing of regions of
    every size, and of Rotor's regions in regions.

    Attributes:
        effort: how long to search, 0 to 20; as of `Optimal`.
    """

    effort: float = DEFAULT_EFFORT

    def __post_init__(self) -> None:
        checked_effort(self.effort)

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        """The plan.

        Raises:
            BudgetError: none of them fits; ``smallest_bytes`` is the lowest peak among them.
        """
        return by_calls(prepared(graph, profile), budget_bytes, Work.of(self.effort))


def by_calls(tables: Prepared, budget_bytes: int | None, work: Work) -> Plan:
    """As `ByCalls`, with the work that is left."""
    fitting = _fitting(tables, budget_bytes, work)
    if not fitting:
        smallest = tables.once(_smallest)
        if budget_bytes is not None and smallest.peak_bytes > budget_bytes:
            raise BudgetError(
                f"no plan within {budget_bytes} bytes: the smallest peak found is "
                f"{smallest.peak_bytes}",
                budget_bytes=budget_bytes,
                smallest_bytes=smallest.peak_bytes,
                smallest_plan=dataclasses.replace(smallest.plan, policy="calls"),
            )
        fitting = [smallest]
    return _best(fitting)


def at_hand_by_calls(tables: Prepared, budget_bytes: int | None, work: Work) -> Plan | None:
    """The same, or None where a plan that fits would have to be looked for."""
    fitting = _fitting(tables, budget_bytes, work)
    return _best(fitting) if fitting else None


def _fitting(tables: Prepared, budget_bytes: int | None, work: Work) -> list[_Candidate]:
    """The fastest of each kind that stays within a budget, as far as there is work left."""
    pricer = tables.pricer
    untouched = Plan("none")
    if budget_bytes is None or pricer.estimate(untouched).peak_bytes <= budget_bytes:
        return _priced(pricer, (untouched,))
    found = [c for c in tables.once(_simple) if c.peak_bytes <= budget_bytes]
    levels = tables.once(_rows)
    if levels is not None and (parts := levels.fastest(budget_bytes)) is not None:
        found.extend(_priced(pricer, (plan_of_parts(parts),)))
    if work.is_left or not found:
        packing = Packing(pricer, tables.once(_choices), work=work)
        found.extend(_priced(pricer, (packing.least_time(budget_bytes),)))
    return found


def _best(fitting: list[_Candidate]) -> Plan:
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


def _choices(tables: Prepared) -> list[Choice]:
    return call_choices(tables.graph, tables.profile, tables.pricer)


def _rows(tables: Prepared) -> ChainPlans | None:
    return chain_plans(BlockChain(tables.pricer))


def _simple(tables: Prepared) -> list[_Candidate]:
    return _priced(tables.pricer, _named(tables.graph, tables.profile))


def _smallest(tables: Prepared) -> _Candidate:
    """The lowest peak found: the budget has no part in it."""
    packing = Packing(tables.pricer, tables.once(_choices), work=Work(_LEAST_S))
    plans = [Plan("none"), packing.least_memory()]
    levels = tables.once(_rows)
    if levels is not None and levels.smallest is not None:
        plans.append(plan_of_parts(levels.smallest))
    candidates = [*tables.once(_simple), *_priced(tables.pricer, plans)]
    return min(candidates, key=lambda c: (c.peak_bytes, c.time_s))


def _named(graph: Graph, profile: Profile) -> Iterator[Plan]:
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
