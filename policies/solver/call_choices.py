"""Ways to recompute by calls: which results stay resident, which calls go together; priced."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.policies.blocks import blocks, chains, opened, region
from actckpt.policies.selective import saved_ops
from actckpt.policies.solver.mincut import trades
from actckpt.policies.solver.packing import Choice
from actckpt.policies.solver.pruning import undominated
from actckpt.policies.solver.ranking import ranked
from actckpt.policies.solver.run_lengths import Levels
from actckpt.policies.solver.structure import structure
from actckpt.pricing.simulate import Pricer

LENGTHS = (2, 3, 4, 6, 8, 12, 16)
SHORT = 8

# the calls that a region takes, each the innermost that may be recomputed alone
Covers = frozenset[int]


def call_choices(graph: Graph, profile: Profile, pricer: Pricer) -> list[Choice]:
    """Regions of every size, from single calls to spans of blocks, each taking its calls."""
    options = Options(graph, profile)
    base = pricer.estimate(Plan(""))
    coarse = blocks(graph)
    found: list[Choice] = []
    survivors: dict[Hashable, list[int]] = {}

    def priced(
        candidates: list[tuple[Covers, Region]], wanted: list[int] | None
    ) -> list[tuple[int, Choice]]:
        choices = []
        for index in range(len(candidates)) if wanted is None else wanted:
            covers, candidate = candidates[index]
            try:
                price = pricer.estimate(Plan("", (candidate,)))
            except PlanError:
                continue
            delta = Levels.of(price.timeline - base.timeline)
            time_s = price.time_s - base.time_s
            choices.append((index, Choice(covers, (candidate,), time_s, delta)))
        return choices

    for b in coarse:
        key = structure(graph, b)
        known = survivors.get(key)
        choices = priced(list(options.within(b)), known)
        if known is None:
            choices = undominated(choices)
            survivors[key] = [index for index, _ in choices]
        found += [choice for _, choice in choices]
    longer = [
        (frozenset(c for b in taken for c in options.covers(b)), candidate)
        for taken, candidate in spans(graph, coarse, len(coarse))
    ]
    return found + [choice for _, choice in undominated(priced(longer, None))]


class Options:
    """All regions within a block, at every depth of its calls. Equal calls are solved once."""

    def __init__(self, graph: Graph, profile: Profile) -> None:
        self.graph = graph
        self.profile = profile
        self._kept: dict[Hashable, list[frozenset[int]]] = {}

    def within(self, stage: int) -> Iterator[tuple[Covers, Region]]:
        """Regions of this call and of the calls inside it, in an order that equal calls share."""
        inner = opened(self.graph, stage)
        covers = self.covers(stage)
        for found in self._of(stage):
            yield covers, found
        if inner:
            yield (
                covers,
                region(self.graph, stage, stage, *(region(self.graph, child) for child in inner)),
            )
        for child in inner:
            yield from self.within(child)
        for taken, found in spans(self.graph, inner, len(inner) - 1):
            yield frozenset(c for stage in taken for c in self.covers(stage)), found

    def covers(self, stage: int) -> Covers:
        """The innermost calls of a stage."""
        inner = opened(self.graph, stage)
        return frozenset(c for child in inner for c in self.covers(child)) or frozenset({stage})

    def _of(self, stage: int) -> Iterator[Region]:
        """The call as one region, with ever more of its results kept."""
        s = self.graph.stages[stage]
        key = structure(self.graph, stage)
        whole = region(self.graph, stage)
        if key not in self._kept:
            cuts = (trade.kept for trade in trades(self.graph, self.profile, s.first, s.last))
            found = dict.fromkeys([*cuts, *ranked(self.graph, self.profile, whole)])
            self._kept[key] = [frozenset(i - s.first for i in kept) for kept in found]
        yield whole
        for kept in self._kept[key]:
            if kept:
                chosen = frozenset(i + s.first for i in kept)
                saved = saved_ops(self.graph, s.first, s.last, chosen)
                yield Region(s.key, s.key, (), saved)


def spans(
    graph: Graph, stages: tuple[int, ...], longest: int
) -> Iterator[tuple[tuple[int, ...], Region]]:
    """Regions of several linked stages, nothing saved inside, with the stages that each takes.

    In a short chain they begin everywhere, in a long one of n at multiples of their length: n log n
    of them instead of n squared.
    """
    for chain in chains(graph, stages):
        for length in LENGTHS:
            if length > min(longest, len(chain)):
                break
            step = 1 if len(chain) <= SHORT else length
            for start in range(0, len(chain) - length + 1, step):
                taken = chain[start : start + length]
                yield taken, region(graph, taken[0], taken[-1])
