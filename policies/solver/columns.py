"""Choices made to measure: of each segment what is best at the prices that memory has when."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actckpt.data.plan import Plan
from actckpt.policies.solver.burst_choices import Way, moved, priced
from actckpt.policies.solver.packing import Choice
from actckpt.policies.solver.segments import Segment, segment_structure, segments
from actckpt.policies.solver.staged import StagedSegment
from actckpt.policies.solver.threads import in_threads
from actckpt.policies.solver.work import Work
from actckpt.pricing.simulate import Pricer

# stages of a segment in whose backward pass memory has a price
_STAGES = 4
# so many segments in a row are also solved as one, or as many as have few operations; while these
# bring a long chain (so many segments) within its budget only those near its end, and small ones
# where most are alike
_LONGEST = 3
_PAIR = 2
_SHORT = 60
_MANY = 32
# the most columns of one program
_WIDTH = 6_000
# of a search's work; the rest is for what chooses among the columns
_SHARE = 0.5
# a linear program's mixture of choices is no plan; what is best nearby may replace it
_NEARBY = (0.9, 1.1)


# segments in a row, as one: its operations, and how many segments they are
Span = tuple[Segment, int]


@dataclass(frozen=True, slots=True)
class _Question:
    """What a span's program is asked; equal keys have the same answer, moved."""

    span: Segment
    program: StagedSegment
    cost: np.ndarray
    key: Hashable


def _is_small(span: Segment) -> bool:
    return span[1] - span[0] <= _SHORT


class Columns:
    """Column generation: the choices that a packing's prices ask for, each found once.

    Args:
        work: when half of it is spent, nothing more is solved.
    """

    def __init__(self, pricer: Pricer, work: Work | None = None) -> None:
        self.work = Work() if work is None else work
        self.pricer = pricer
        self.base = pricer.estimate(Plan(""))
        self.segments = segments(pricer.possible)
        self._structures: dict[Segment, Hashable] = {}
        self._programs: dict[tuple[Segment, int], StagedSegment] = {}
        # answers to questions; those that a rounded linear program gave
        self._solved: dict[Hashable, tuple[Segment, Way]] = {}
        self._rounded: dict[Hashable, tuple[Segment, Way]] = {}
        self._everywhere = len(self.segments) <= _MANY
        self._choices: dict[Way, Choice | None] = {}

    def at(
        self,
        prices: Mapping[int, float],
        known: Sequence[Choice],
        within: Segment | None = None,
        *,
        whole: bool = True,
    ) -> list[Choice]:
        """The best way of every segment, and of segments in a row, without those known already.

        Args:
            prices: instant -> seconds that a byte costs there.
            within: operations; only of segments among them, however much work that is.
            whole: else what is nearly the best, by linear programs.
        """
        if within is None:
            return self._fresh([prices], self._spans(), known, whole)
        first, last = within
        spans = (
            [(span, length) for span, length in row if first <= span[0] and span[1] <= last]
            for row in self._spans(rationed=False)
        )
        return self._fresh([prices], spans, known, whole)

    @property
    def is_left(self) -> bool:
        """Whether there is work left to find more."""
        return self.work.spent_s < _SHARE * self.work.allowed_s

    def widen(self) -> bool:
        """Segments in a row are looked at all along a long chain from now on; if they were not."""
        before, self._everywhere = self._everywhere, True
        return not before

    def near(
        self, prices: Mapping[int, float], known: Sequence[Choice], *, whole: bool = True
    ) -> list[Choice]:
        """The same at prices a little lower and higher, of single segments and pairs."""
        scaled = [{at: price * s for at, price in prices.items()} for s in _NEARBY]
        pairs = itertools.islice(self._spans(rationed=False), _PAIR)
        return self._fresh(scaled, pairs, known, whole)

    def _fresh(
        self,
        several: Sequence[Mapping[int, float]],
        rows: Iterable[Sequence[Span]],
        known: Sequence[Choice],
        whole: bool,
    ) -> list[Choice]:
        parts = {choice.parts for choice in known}
        ways: dict[Way, None] = {}
        for row in rows:
            asked = [self._question(span, prices) for span in row for prices in several]
            ways |= dict.fromkeys(self._answers([q for q in asked if q is not None], whole))
        found = (self._priced(way) for way in ways if way and way not in parts)
        return [choice for choice in found if choice is not None]

    def _spans(self, rationed: bool = True) -> Iterator[list[Span]]:
        """Segments; then two in a row as one, then three, as long as there is work left."""
        parts, count = self.segments, len(self.segments)
        for length in self._lengths:
            if rationed and length > 1 and not self.is_left:
                return
            apart = 1 if length <= _LONGEST or count <= _MANY else length // 2
            row = {
                start: (parts[start][0], parts[start + length - 1][1])
                for start in range(0, count - length + 1, apart)
            }
            if length > 1 and not self._everywhere:
                near = count - length - _LONGEST
                small = self._if_alike([span for span in row.values() if _is_small(span)])
                row = {start: s for start, s in row.items() if start >= near or s in small}
            yield [(s, length) for s in row.values() if length <= _LONGEST or _is_small(s)]

    def _if_alike(self, spans: Sequence[Segment]) -> frozenset[Segment]:
        """All of them, if on average two have the same structure: these are solved once."""
        structures = {self._structure(span) for span in spans}
        return frozenset(spans if 2 * len(structures) <= len(spans) else ())

    @cached_property
    def _lengths(self) -> list[int]:
        """How many segments in a row are solved as one; of a long chain not every number."""
        count = len(self.segments)
        if count <= _MANY:
            return list(range(1, count + 1))
        return [n for n in range(1, count + 1) if n <= _LONGEST or n & (n - 1) == 0]

    def _priced(self, way: Way) -> Choice | None:
        if way not in self._choices:
            self.work.spend_priced(self.pricer.count)
            self._choices[way] = priced(self.pricer, self.base, way)
        return self._choices[way]

    def _question(self, span: Span, prices: Mapping[int, float]) -> _Question | None:
        """What to ask of a span at these prices; None where there is nothing to choose."""
        segment, length = span
        program = self._program(segment, length)
        if not program.needed:
            return None
        first, last = program.window
        if any(first <= instant < last for instant in prices):
            program = self._program(segment, _STAGES)
        if program.columns > _WIDTH:
            return None
        cost = program.costs(prices)
        return _Question(segment, program, cost, (self._structure(segment), cost.tobytes()))

    def _answers(self, asked: Sequence[_Question], whole: bool) -> list[Way]:
        """The best way for each, as far as work is left; equal questions are answered once."""
        fresh: dict[Hashable, _Question] = {}
        for question in reversed(asked):
            if question.key in self._solved or (not whole and question.key in self._rounded):
                continue
            if question.key not in fresh:
                if not self.is_left:
                    continue
                program = question.program
                self.work.spend_staged(program.rows, program.columns, whole=whole)
            fresh[question.key] = question
        found = in_threads([q.program.solver(q.cost, whole=whole) for q in fresh.values()])
        for question, solved in zip(fresh.values(), found, strict=True):
            chosen = solved.chosen
            way = () if chosen is None else question.program.bursts(chosen)
            answers = self._solved if solved.whole else self._rounded
            answers[question.key] = (question.span, way)
        answered = self._rounded | self._solved
        return [self._answer(q, *answered[q.key]) for q in asked if q.key in answered]

    def _answer(self, question: _Question, source: Segment, way: Way) -> Way:
        if source == question.span:
            return way
        return moved(self.pricer.possible, way, source, question.span)

    def _program(self, span: Segment, stages: int) -> StagedSegment:
        key = (span, stages)
        if key not in self._programs:
            self._programs[key] = StagedSegment(self.pricer, span, stages)
        return self._programs[key]

    def _structure(self, span: Segment) -> Hashable:
        if span not in self._structures:
            self._structures[span] = segment_structure(self.pricer.possible, span)
        return self._structures[span]
