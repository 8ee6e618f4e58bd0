"""Ways to recompute each segment by operations, priced: what a packing chooses from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from actckpt.errors import PlanError
from actckpt.plan import Burst, Plan
from actckpt.policies.cuts import Cut, cuts
from actckpt.policies.packing import Choice, spread, undominated
from actckpt.policies.segments import Segment, born_in, segment_structure, segments
from actckpt.policies.shared_holds import holds_of
from actckpt.pricing.simulate import Estimate, Pricer
from actckpt.profile import Profile
from actckpt.recomputation import Recomputation

logger = logging.getLogger("actckpt")

# how many bursts, one after the other in backward, may make a segment again
GROUPS = (1, 2, 4, 8)
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
SHORT = 16
# trades tried of a few segments in a row, and of more
SMALL, MANY = 3, 8
FEW = 2
# points of the hull beyond the first choice that the second may be
FURTHER = 4
# results of a segment of which every choice is tried
TINY = 6
# choices closer than this share of the untouched peak are one
CLOSE = 1000

# bursts that together drop something, and what they drop
Way = tuple[Burst, ...]


def burst_choices(profile: Profile, pricer: Pricer, longest: int) -> list[Choice]:
    """The best ways to recompute every segment. Equal segments are solved once.

    Args:
        longest: up to so many segments in a row as one, for budgets that leave less than a result
            each.
    """
    possible = pricer.possible
    found: list[Choice] = []
    solved: dict[Hashable, tuple[Segment, list[Way]]] = {}
    base = pricer.estimate(Plan(""))
    for segment, length in _rows(segments(possible), longest):
        key = segment_structure(possible, segment)
        if key not in solved:
            most = MANY if length <= SMALL else FEW
            ways = list(SegmentWays(possible, profile, segment).all(most))
            choices = [
                (n, priced) for n, way in enumerate(ways) if (priced := _priced(pricer, base, way))
            ]
            best = spread(undominated(choices, base.peak_bytes // CLOSE), pricer.graph.forward_end)
            solved[key] = (segment, [ways[n] for n, _ in best])
            found += [choice for _, choice in best]
            continue
        source, ways = solved[key]
        for way in ways:
            choice = _priced(pricer, base, moved(possible, way, source, segment))
            if choice is not None:
                found.append(choice)
    return found


def _rows(parts: Sequence[Segment], longest: int) -> Iterator[tuple[Segment, int]]:
    """Segments, and several in a row as one, with how many.

    In a short chain they begin everywhere, in a long one at multiples of half their length.
    """
    for length in LENGTHS:
        if length > min(longest, len(parts)):
            break
        step = 1 if len(parts) <= SHORT else max(1, length // 2)
        for start in range(0, len(parts) - length + 1, step):
            yield (parts[start][0], parts[start + length - 1][1]), length


def _priced(pricer: Pricer, base: Estimate, way: Way) -> Choice | None:
    graph = pricer.graph
    try:
        price = pricer.estimate(Plan("", bursts=way))
    except PlanError as error:
        logger.debug("bursts: %s", error)
        return None
    takes = frozenset(
        graph.values[graph.saves[k].value].storage for b in way for w in b.walk() for k in w.drops
    )
    time_s = sum(sum(effect.seconds) for effect in price.effects)
    delta = price.timeline - base.timeline
    holds = holds_of(pricer, price.effects)
    for hold in holds:
        if not hold.saved:
            hold.added_to(delta, -1)
    return Choice(takes, way, time_s, delta, holds)


class SegmentWays:
    """The ways to recompute one segment.

    Two choices of what stays, both on the hull of bytes against seconds: some activations from the
    forward pass on, more of them from the moment when backward reaches the segment. What neither
    keeps is made again in one burst or in several, each just before it is needed.
    """

    def __init__(self, possible: Recomputation, profile: Profile, segment: Segment) -> None:
        self.possible = possible
        self.segment = segment
        self.needed = [s for s in born_in(possible, segment) if s in possible.saves]
        self.hull: list[Cut] = cuts(possible, profile, *segment)

    def all(self, trades: int) -> Iterator[Way]:
        """Every way, in an order that equal segments share.

        Args:
            trades: how many points of the hull, those that keep the least first.
        """
        if not self.needed:
            return
        for kept in self._between(trades):
            for groups in (1, 2):
                way = self.way(kept, None, groups)
                if way is not None:
                    yield way
        for i, cut in enumerate(self.hull[:-1][:trades]):
            for more in (None, *self.hull[i + 1 : -1][:FURTHER]):
                for groups in GROUPS:
                    way = self.way(cut.kept, more.kept if more is not None else None, groups)
                    if way is not None:
                        yield way

    def _between(self, trades: int) -> Iterator[frozenset[int]]:
        """Choices of what to keep between the points of the hull: one result more, or less.

        Of a small segment every choice there is.
        """
        if len(self.needed) <= TINY:
            for size in range(len(self.needed)):
                yield from map(frozenset, itertools.combinations(self.needed, size))
            return
        known = {cut.kept for cut in self.hull}
        for cut in self.hull[:trades]:
            for sid in self.needed:
                kept = cut.kept ^ {sid}
                if kept not in known:
                    known.add(kept)
                    yield kept

    def way(
        self,
        kept: frozenset[int],
        held: frozenset[int] | None,
        groups: int,
        outside: frozenset[int] = frozenset(),
    ) -> Way | None:
        """Keeping ``kept`` from the forward pass on, ``held`` from the first burst on.

        Args:
            groups: number of bursts for the rest.
            outside: activations of earlier segments that an enclosing burst hands over.
        """
        possible = self.possible
        first = self.segment[0]
        storages = possible.graph.storages

        def may_pin(sid: int) -> bool:
            if sid in outside:
                return False
            inside = storages[sid].born >= first
            return not inside or sid in kept or sid in possible.stays

        rest = [s for s in self.needed if s not in kept]
        if held is None:
            bursts = self._grouped(rest, groups, may_pin, outside)
            return tuple(bursts) if bursts else None
        more = [s for s in sorted(held - kept) if s in possible.makers]
        outer = possible.closure(more, may_pin, outside)
        if outer is None or not more:
            return None
        inner = self._grouped(
            [s for s in rest if s not in held], groups, may_pin, frozenset(more) | outside
        )
        if not inner:
            return None
        return (Burst(outer[0], self._saves(s for s in more if s in rest), tuple(inner)),)

    def _grouped(
        self, drops: list[int], groups: int, may_pin: Callable[[int], bool], handed: frozenset[int]
    ) -> list[Burst] | None:
        if len(drops) < groups or not drops:
            return None
        found = []
        for group in self._groups(drops, groups):
            closure = self.possible.closure(group, may_pin, handed)
            if closure is None:
                return None
            found.append(Burst(closure[0], self._saves(group)))
        return found

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

    def _saves(self, storages: Iterable[int]) -> tuple[int, ...]:
        saves = self.possible.saves
        return tuple(sorted(itertools.chain.from_iterable(saves[s] for s in storages)))


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
