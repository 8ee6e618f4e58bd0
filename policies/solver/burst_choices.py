"""Ways to recompute each segment by operations, priced: what a packing chooses from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Iterator

from actckpt.data.plan import Burst, Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.interpreting.recomputation import Recomputation
from actckpt.policies.solver.cuts import Cut, cuts
from actckpt.policies.solver.packing import Choice
from actckpt.policies.solver.pruning import spread, undominated
from actckpt.policies.solver.run_lengths import Levels
from actckpt.policies.solver.segments import Segment, born_in, segment_structure, segments
from actckpt.policies.solver.shared_holds import holds_of
from actckpt.pricing.simulate import Estimate, Pricer

logger = logging.getLogger("actckpt")

# how many bursts, one after the other in backward, may make a segment again
GROUPS = (1, 2, 4, 8)
# results of a segment of which every choice is tried
TINY = 6
# choices closer than this share of the untouched peak are one
CLOSE = 1000
# what a choice pays of following the calls that it needs: others need some of them, too
FOLLOWED = 0.8

# bursts that together drop something, and what they drop
Way = tuple[Burst, ...]


def burst_choices(profile: Profile, pricer: Pricer) -> list[Choice]:
    """The best ways to recompute every segment. Equal segments are solved once."""
    possible = pricer.possible
    found: list[Choice] = []
    solved: dict[Hashable, tuple[Segment, list[Way]]] = {}
    base = pricer.estimate(Plan(""))
    for segment in segments(possible):
        key = segment_structure(possible, segment)
        if key not in solved:
            ways = list(SegmentWays(possible, profile, segment).all())
            choices = [
                (n, choice) for n, way in enumerate(ways) if (choice := priced(pricer, base, way))
            ]
            best = spread(undominated(choices, base.peak_bytes // CLOSE), pricer.graph.forward_end)
            solved[key] = (segment, [ways[n] for n, _ in best])
            found += [choice for _, choice in best]
            continue
        source, ways = solved[key]
        for way in ways:
            choice = priced(pricer, base, moved(possible, way, source, segment))
            if choice is not None:
                found.append(choice)
    return found


def priced(pricer: Pricer, base: Estimate, way: Way) -> Choice | None:
    """A way with what it costs and frees; None if it cannot be, or drops nothing."""
    graph = pricer.graph
    try:
        price = pricer.estimate(Plan("", bursts=way))
    except PlanError as error:
        logger.debug("bursts: %s", error)
        return None
    takes = frozenset(
        graph.values[graph.saves[k].value].storage for b in way for w in b.walk() for k in w.drops
    )
    if not takes:
        return None
    time_s = sum(sum(effect.seconds) for effect in price.effects) + FOLLOWED * price.following_s
    delta = price.timeline - base.timeline
    holds = holds_of(pricer, price.effects)
    for hold in holds:
        if not hold.saved:
            hold.added_to(delta, -1)
    return Choice(takes, way, time_s, Levels.of(delta), holds)


class SegmentWays:
    """Ways to recompute one segment, to begin with; `Columns` makes those that prices ask for.

    What stays is a point of the hull of bytes against seconds, or anything in a segment of few
    results. The rest is made again in one burst or in several, each just before it is needed.
    """

    def __init__(self, possible: Recomputation, profile: Profile, segment: Segment) -> None:
        self.possible = possible
        self.first = segment[0]
        self.needed = [s for s in born_in(possible, segment) if s in possible.saves]
        self.hull: list[Cut] = cuts(possible, profile, *segment)

    def all(self) -> Iterator[Way]:
        """Every way, in an order that equal segments share."""
        kept = [cut.kept for cut in self.hull[:-1]]
        if len(self.needed) <= TINY:
            every = (itertools.combinations(self.needed, n) for n in range(len(self.needed)))
            kept += map(frozenset, itertools.chain.from_iterable(every))
        for stays in dict.fromkeys(kept):
            for groups in GROUPS:
                way = self.way(stays, groups)
                if way:
                    yield way

    def way(self, kept: frozenset[int], groups: int) -> Way:
        """Keeping ``kept`` from the forward pass on; () where that cannot be.

        Args:
            groups: number of bursts for the rest.
        """
        possible = self.possible

        def may_pin(sid: int) -> bool:
            outside = possible.graph.storages[sid].born < self.first
            return outside or sid in kept or sid in possible.stays

        drops = [s for s in self.needed if s not in kept]
        if len(drops) < groups:
            return ()
        found = []
        for group in self._groups(drops, groups):
            closure = possible.closure(group, may_pin)
            if closure is None:
                return ()
            saves = itertools.chain.from_iterable(possible.saves[s] for s in group)
            found.append(Burst(closure[0], tuple(sorted(saves))))
        return tuple(found)

    def _groups(self, drops: list[int], count: int) -> list[list[int]]:
        """``drops`` in the order of their use in backward, cut into shares of equal bytes."""
        graph, saves = self.possible.graph, self.possible.saves
        order = sorted(
            drops,
            key=lambda s: (min(graph.saves[k].first_use for k in saves[s]
                               if graph.saves[k].first_use >= 0), s),
        )  # fmt: skip
        total = sum(graph.storages[s].bytes for s in order) or 1
        found: list[list[int]] = [[] for _ in range(count)]
        passed = 0
        for s in order:
            found[min(count - 1, passed * count // total)].append(s)
            passed += graph.storages[s].bytes
        return [group for group in found if group]


def moved(possible: Recomputation, way: Way, source: Segment, target: Segment) -> Way:
    """The same way for a segment of equal structure."""
    shift = target[0] - source[0]
    here, there = born_in(possible, source), born_in(possible, target)
    saves = {
        a: b
        for s, t in zip(here, there, strict=True)
        for a, b in zip(possible.saves.get(s, ()), possible.saves.get(t, ()), strict=True)
    }

    def move(burst: Burst) -> Burst:
        return Burst(
            tuple(op + shift for op in burst.ops),
            tuple(sorted(saves[k] for k in burst.drops)),
            tuple(move(child) for child in burst.inner),
        )

    return tuple(move(b) for b in way)
