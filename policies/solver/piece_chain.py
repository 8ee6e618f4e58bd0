"""The forward cut into pieces that one saved activation links; a schedule as bursts in bursts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from actckpt.data.plan import Burst, Plan
from actckpt.errors import PlanError
from actckpt.interpreting.bursts import place_bursts
from actckpt.policies.blocks import blocks
from actckpt.policies.solver.burst_choices import CLOSE, SegmentWays, moved
from actckpt.policies.solver.chain import NEVER_S, Again, Chain, Kept, Schedule, Way
from actckpt.policies.solver.chain_levels import ChainLevels
from actckpt.policies.solver.segments import Segment, born_in, segment_structure
from actckpt.pricing.effect import GENERATOR_STATE_BYTES
from actckpt.pricing.simulate import Estimate, Pricer

# pieces in a row that are kept in ways of their own
_ROW = 2
# what is read so many blocks' operations after it was made stays until backward has passed it
_FAR = 2.5
# ways of less difference are one
_ALIKE = 1.01


class _Piece(NamedTuple):
    """Operations of the forward, and the first one of backward that uses what they save."""

    first: int
    last: int
    entered: int


class _Priced(NamedTuple):
    """A way, and what its bursts change in the levels of the pieces' own backward."""

    way: Way
    changes: np.ndarray


class PieceChain:
    """Pieces between the points that one saved activation alone crosses, in some of their ways.

    Two pieces a block of a transformer. What is read far behind the place where it was made (an
    encoder's output, a mask) counts as there until backward has passed it.
    """

    leaves_out_little = True

    def __init__(self, pricer: Pricer) -> None:
        self.pricer = pricer
        self.graph = pricer.graph
        # what outlives the forward anyhow, as in a cache, is not worth dropping
        lasting = {s for s in pricer.possible.saves if pricer.died[s] > pricer.graph.forward_end}
        self.possible = pricer.possible.keeping(lasting)
        self._readers = self._found_readers()
        self._common = self._found_common()
        self._edges: list[int] = []
        self._pieces: list[_Piece] = []
        if not pricer.possible.refusal:
            self._cut()

    def _found_readers(self) -> dict[int, list[int]]:
        """Activation -> the operations of the forward that read it, in order."""
        possible, (first, last) = self.possible, self.possible.span
        found: dict[int, list[int]] = {}
        for i in range(first, last):
            op = self.graph.ops[i]
            if not op.view:
                for x in possible.inputs(i).union(op.writes) & possible.makers.keys():
                    found.setdefault(x, []).append(i)
        return found

    def _found_common(self) -> set[int]:
        """What stays until backward has passed the chain."""
        stages = [self.graph.stages[b] for b in blocks(self.graph)]
        far = _FAR * float(np.median([s.last - s.first for s in stages])) if stages else 0.0
        born, makers = self.pricer.born, self.possible.makers
        found = {x for x, readers in self._readers.items() if readers[-1] - born[x] > far}
        return found | {x for x, ops in makers.items() if not all(map(self.possible.can_run, ops))}

    def _crossings(self) -> Iterator[tuple[int, int]]:
        """(operation, activation): what alone is read behind a point, and was made before it."""
        first, last = self.possible.span
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for x, readers in self._readers.items():
            born, read = int(self.pricer.born[x]), readers[-1]
            if x not in self._common and read > born:
                begins.setdefault(born + 1, []).append(x)
                ends.setdefault(read + 1, []).append(x)
        alive: set[int] = set()
        crossed: set[int] = set()
        for at in range(first + 1, last):
            alive.update(begins.get(at, ()))
            alive.difference_update(ends.get(at, ()))
            if len(alive) == 1 and alive <= self.possible.saves.keys() - crossed:
                (x,) = alive
                crossed.add(x)
                yield at, x

    def _cut(self) -> None:
        """Each piece saves something, and backward passes them in order."""
        graph, (begin, end) = self.graph, self.possible.span
        crossing = dict(self._crossings())
        saves = [k for ks in self.possible.saves.values() for k in ks]
        used = sorted((graph.saves[k].at, u) for k in saves if (u := graph.saves[k].first_use) >= 0)

        def entered(first: int, last: int) -> int | None:
            return min((use for at, use in used if first < at <= last), default=None)

        first = begin
        for last in [*crossing, end]:
            lowest = entered(first, last)
            if lowest is None:
                continue
            while self._pieces and self._pieces[-1].entered <= lowest:
                first = self._pieces.pop().first
                lowest = entered(first, last)
                assert lowest is not None
            self._pieces.append(_Piece(first, last, lowest))
            first = last
        if self._pieces:
            self._pieces[-1] = self._pieces[-1]._replace(last=end)
        self._edges = [crossing.get(piece.last, -1) for piece in self._pieces]

    @property
    def largest_share(self) -> float:
        """Of the bytes that are saved and can be dropped, the most that one piece makes."""
        sizes = self.pricer.bytes
        spans = [(piece.first, piece.last) for piece in self._pieces]
        saved = self.possible.saves.keys()
        made = [sum(sizes[x] for x in born_in(self.possible, s) if x in saved) for s in spans]
        return float(max(made, default=1) / max(1, sum(made)))

    @cached_property
    def chain(self) -> Chain | None:
        """The numbers; None where there are no two pieces."""
        count, pricer, profile = len(self._pieces), self.pricer, self.pricer.profile
        if count < 2:
            return None
        sizes = pricer.bytes
        out = [int(sizes[x]) if x >= 0 else 0 for x in self._edges]
        inside = [self._needed(b, b) for b in range(count)]
        edges = [[x] if x >= 0 else [] for x in self._edges]
        firsts = [piece.first for piece in self._pieces]
        levels = self._levels
        self._last_s = [self._replay_s(xs, a) for xs, a in zip(inside, firsts, strict=True)]
        self._again_s = [
            self._replay_s([*xs, *edge], a)
            for xs, edge, a in zip(inside, edges, firsts, strict=True)
        ]
        kinds, ways, peaks = self._all_ways()
        return Chain(
            kinds=kinds,
            ways=ways,
            peaks_bytes=peaks,
            before_bytes=levels.before[[piece.entered for piece in self._pieces]],
            first_bytes=np.array([levels.level[p.first : p.last].max() for p in self._pieces]),
            forward_bytes=np.array(
                [levels.forward_peak_bytes(p.first, p.last) for p in self._pieces]
            ),
            out_bytes=np.array(out),
            again_s=np.array(self._again_s),
            last_s=np.array(self._last_s),
            edge_s=np.array([profile.burst_save_s * self._saves_of(edge) for edge in edges]),
            node_s=profile.burst_s,
            after_bytes=int(levels.level[self._pieces[-1].last : self._pieces[-1].entered].max()),
        )

    @cached_property
    def _levels(self) -> ChainLevels:
        mine = {k for x, ks in self.possible.saves.items() if x not in self._common for k in ks}
        until = {x: self._until(self._first_reader(x)) for x in self._common}
        states = [
            (piece.first, piece.entered, self._states_bytes(piece.first, piece.last))
            for piece in self._pieces
        ]
        return ChainLevels(self.pricer, mine, until, states)

    def _first_reader(self, common: int) -> int:
        """The earliest piece that reads something common: backward comes to it last."""
        first = self._readers.get(common, [0])[0]
        return next((b for b, piece in enumerate(self._pieces) if first < piece.last), 0)

    def _states_bytes(self, first: int, last: int) -> int:
        """What the generators' states take from which random operations are drawn again."""
        ops = self.graph.ops[first:last]
        calls = {self.possible.call_of(i) for i, op in enumerate(ops, first) if op.random}
        on_cpu = self.graph.device == "cpu" and not self.graph.stands_for
        return GENERATOR_STATE_BYTES * len(calls) if on_cpu else 0

    def _until(self, piece: int) -> int:
        """Operation at which the backward of a piece ends."""
        return self._pieces[piece - 1].entered if piece else self.pricer.count

    def _saves_of(self, storages: Iterable[int]) -> int:
        return sum(len(self.possible.saves.get(x, ())) for x in storages)

    def _needed(self, first: int, last: int) -> list[int]:
        """What backward needs of some pieces, what the next one reads apart."""
        saves, edge = self.graph.saves, self._edges[last]
        segment = (self._pieces[first].first, self._pieces[last].last)
        return [
            x
            for x in born_in(self.possible, segment)
            if x in self.possible.saves
            and x not in self._common
            and x != edge
            and any(saves[k].first_use >= 0 for k in self.possible.saves[x])
        ]

    def _is_there(self, storage: int, first: int) -> bool:
        """Whether an operation from ``first`` on finds an activation as the forward left it."""
        there = storage in self.possible.stays or storage in self._common
        return there or bool(self.pricer.born[storage] < first)

    def _replay_s(self, wanted: Iterable[int], first: int) -> float:
        """Making some of a piece again, from what the piece before it hands over."""
        found = self.possible.closure(wanted, lambda x: self._is_there(x, first))
        if found is None:
            return NEVER_S
        time_s = self.pricer.time_s[list(found[0])].sum()
        return float(time_s + self.pricer.profile.burst_op_s * len(found[0]))

    def _all_ways(
        self,
    ) -> tuple[tuple[int, ...], tuple[tuple[Way, ...], ...], tuple[tuple[int, ...], ...]]:
        """Kinds of pieces, the ways of each, and every piece's peaks. Equal pieces share theirs."""
        whole = self.pricer.estimate(Plan(""))
        known: dict[Hashable, int] = {}
        table: list[list[_Priced]] = []
        kinds, peaks = [], []
        for b in range(len(self._pieces)):
            ends = range(b, min(len(self._pieces), b + _ROW))
            key = tuple(
                (
                    segment_structure(self.possible, (self._pieces[b].first, self._pieces[e].last)),
                    self._until(b) - self._pieces[e].entered,
                )
                for e in ends
            )
            if key not in known:
                known[key] = len(table)
                table.append(self._ways(b, whole))
            kinds.append(known[key])
            peaks.append(tuple(self._peak_bytes(b, priced) for priced in table[known[key]]))
        ways = tuple(tuple(priced.way for priced in of_kind) for of_kind in table)
        return tuple(kinds), ways, tuple(peaks)

    def _peak_bytes(self, piece: int, priced: _Priced) -> int:
        """The highest level while backward passes pieces that are kept in a way."""
        end = piece + priced.way.stages - 1
        saves, possible = self.graph.saves, self.possible
        made = {
            x: max(int(saves[k].released) for k in possible.saves[x])
            for x in [*self._needed(piece, end), self._edges[end]]
            if x in possible.saves
        }
        window = self._levels.backward(made, self._pieces[end].entered, self._until(piece))
        length = min(len(window), len(priced.changes))
        return int((window[:length] + priced.changes[:length]).max(initial=0))

    def _ways(self, piece: int, whole: Estimate) -> list[_Priced]:
        """The ways of a piece and of the rows that begin with it, without those worse in all."""
        found = [
            priced
            for end in range(piece, min(len(self._pieces), piece + _ROW))
            for bursts in self._bursts(piece, end)
            if (priced := self._priced(piece, end, bursts, whole)) is not None
        ]
        close_bytes = whole.peak_bytes / CLOSE
        best: list[_Priced] = []
        for new in sorted(found, key=lambda f: (f.way.inside_s, f.way.rest_bytes)):
            if not any(_is_as_good(old, new, close_bytes) for old in best):
                best.append(new)
        return best

    def _bursts(self, piece: int, end: int) -> Iterator[tuple[Burst, ...]]:
        if end == piece:
            yield ()
        edge = {self._edges[end]} & self.possible.saves.keys()
        kept = self.possible.keeping(edge)  # it is handed on in any case: no part of the choice
        span = (self._pieces[piece].first, self._pieces[end].last)
        yield from SegmentWays(kept, self.pricer.profile, span).all()

    def _priced(
        self, piece: int, end: int, bursts: tuple[Burst, ...], whole: Estimate
    ) -> _Priced | None:
        """A way with its numbers; None if it cannot be, or drops what is not in the chain."""
        profile = self.pricer.profile
        try:
            price = self.pricer.estimate(Plan("", bursts=bursts))
        except PlanError:
            return None
        kept = self._kept(piece, end, bursts)
        if kept is None:
            return None
        first, last = self._pieces[piece].first, self._pieces[end].last
        changes = price.timeline - whole.timeline
        needed_bytes = sum(int(self.pricer.bytes[x]) for x in self._needed(piece, end))
        at_rest = int(changes[self.graph.forward_end - 1])
        if any(self.graph.ops[i].random for b in bursts for x in b.walk() for i in x.ops):
            at_rest -= self._states_bytes(first, last)  # they are kept in any case
        extra_s = sum(sum(effect.seconds) for effect in price.effects)
        calls = {self.possible.call_of(i) for i in range(first, last)}
        inside_s = extra_s + profile.follow_s * len(calls)
        inside_s += profile.burst_save_s * self._saves_of(kept)
        all_s = self._last_s[end] + sum(self._again_s[piece:end])
        way = Way(
            stages=end - piece + 1,
            rest_bytes=max(0, needed_bytes + at_rest),
            forward_bytes=self._levels.forward_peak_bytes(first, last, frozenset(kept)),
            inside_s=inside_s,
            last_s=inside_s + self._replay_s(kept, first) - all_s,
            first_s=extra_s + price.following_s,
            bursts=bursts,
            source=(first, last),
        )
        return _Priced(way, changes[self._pieces[end].entered : self._until(piece)])

    def _kept(self, piece: int, end: int, bursts: tuple[Burst, ...]) -> list[int] | None:
        """What is kept of some pieces: what bursts do not drop, and what they read."""
        graph, possible = self.graph, self.possible
        first, last = self._pieces[piece].first, self._pieces[end].last
        dropped = {
            graph.values[graph.saves[k].value].storage
            for burst in bursts
            for inner in burst.walk()
            for k in inner.drops
        }
        needed = self._needed(piece, end)
        if not dropped <= set(needed):
            return None
        pins: set[int] = set()
        for placed in place_bursts(possible, Plan("", bursts=bursts)):
            pins.update(x for x in placed.pins if first <= self.pricer.born[x] < last)
        pins -= {*needed, *self._common, self._edges[end]}
        return [x for x in needed if x not in dropped] + sorted(pins)

    def parts(self, schedule: Schedule) -> Iterator[tuple[Burst, ...]]:
        """The bursts of each item of a schedule that has some.

        Raises:
            PlanError: a part of it cannot be made again from what it would be given.
        """
        for item in schedule:
            if isinstance(item, Again):
                yield (self._node(item, frozenset()),)
            elif item.way.bursts:
                yield self._moved(item)

    def _span(self, first: int, last: int) -> Segment:
        return self._pieces[first].first, self._pieces[last].last

    def _moved(self, part: Kept) -> tuple[Burst, ...]:
        """The bursts of a way, for these very pieces."""
        if not part.way.bursts:
            return ()
        target = self._span(part.first, part.last)
        return moved(self.possible, part.way.bursts, part.way.source, target)

    def _node(self, part: Again, handed: frozenset[int]) -> Burst:
        """The burst that makes again what is kept in a part; those in it make the rest."""
        first = self._pieces[part.first].first
        keep: list[int] = []
        inner: list[Burst] = []
        for piece in part.inside:
            if isinstance(piece, Kept):
                bursts = self._moved(piece)
                inner += bursts
                keep += self._kept(piece.first, piece.last, bursts) or ()
            if piece.last != part.last:
                keep.append(self._edges[piece.last])
        closure = self.possible.closure(
            keep, lambda x: x not in handed and self._is_there(x, first), handed
        )
        if closure is None:
            raise PlanError(f"pieces {part.first} to {part.last} cannot be made again")
        inside = handed | set(keep)
        inner += [self._node(p, inside) for p in part.inside if isinstance(p, Again)]
        saves = sorted(k for x in keep for k in self.possible.saves.get(x, ()))
        return Burst(closure[0], tuple(saves), tuple(inner))


def _is_as_good(old: _Priced, new: _Priced, close_bytes: float) -> bool:
    """Whether a way that was found is no worse than another."""
    a, b = old.way, new.way
    return (
        a.stages == b.stages
        and a.rest_bytes <= b.rest_bytes * _ALIKE
        and a.forward_bytes <= b.forward_bytes * _ALIKE
        and a.last_s <= b.last_s + 1e-9
        and float((old.changes - new.changes).max(initial=0)) <= close_bytes
    )
