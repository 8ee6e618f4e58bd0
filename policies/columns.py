"""Choices made to measure: of each segment what is best at the prices that memory has when."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from actckpt.plan import Plan
from actckpt.policies.burst_choices import Way, moved, priced
from actckpt.policies.packing import Choice
from actckpt.policies.segments import Segment, segment_structure, segments
from actckpt.policies.staged import StagedSegment
from actckpt.pricing.simulate import Pricer

# stages of a segment in whose backward pass memory has a price
_STAGES = 5
# so many segments in a row are also solved as one, or more of few operations; of a long chain only
# those near its end
_LONGEST = 3
_PAIR = 2
_SHORT = 60
_MANY = 32
# the most columns of one program
_WIDTH = 6_000
# squared columns of all programs solved, after which only single segments are
_WORK = 80_000_000
# a linear program's mixture of choices is no plan; what is best nearby may replace it
_NEARBY = (0.9, 1.1)


class Columns:
    """Column generation: the choices that a packing's prices ask for, each found once."""

    def __init__(self, pricer: Pricer) -> None:
        self.pricer = pricer
        self.base = pricer.estimate(Plan(""))
        self.segments = segments(pricer.possible)
        self._structures: dict[Segment, Hashable] = {}
        self._programs: dict[tuple[Segment, int], StagedSegment] = {}
        self._solved: dict[Hashable, tuple[Segment, Way]] = {}
        self._work = 0
        self._choices: dict[Way, Choice | None] = {}

    def at(
        self,
        prices: Mapping[int, float],
        known: Sequence[Choice],
        within: Segment | None = None,
    ) -> list[Choice]:
        """The best way of every segment, and of segments in a row, without those known already.

        Args:
            prices: instant -> seconds that a byte costs there.
            within: operations; only of segments among them, however much work that is.
        """
        if within is None:
            return self._fresh([prices], self._spans(), known)
        first, last = within
        spans = (s for s in self._spans(rationed=False) if first <= s[0][0] and s[0][1] <= last)
        return self._fresh([prices], spans, known)

    def near(self, prices: Mapping[int, float], known: Sequence[Choice]) -> list[Choice]:
        """The same at prices a little lower and higher, of single segments and pairs."""
        scaled = [{at: price * s for at, price in prices.items()} for s in _NEARBY]
        pairs = (span for span in self._spans(rationed=False) if span[1] <= _PAIR)
        return self._fresh(scaled, pairs, known)

    def _fresh(
        self,
        several: Sequence[Mapping[int, float]],
        spans: Iterable[tuple[Segment, int]],
        known: Sequence[Choice],
    ) -> list[Choice]:
        parts = {choice.parts for choice in known}
        ways = dict.fromkeys(
            self._best(span, length, prices) for span, length in spans for prices in several
        )
        found = (self._priced(way) for way in ways if way and way not in parts)
        return [choice for choice in found if choice is not None]

    def _spans(self, rationed: bool = True) -> Iterator[tuple[Segment, int]]:
        """Segments, and some in a row as one, with how many they are."""
        parts = self.segments
        for length in range(1, len(parts) + 1):
            if rationed and length > 1 and self._work > _WORK:
                return
            begin = 0 if length == 1 or len(parts) <= _MANY else len(parts) - length - _LONGEST
            for start in range(max(0, begin), len(parts) - length + 1):
                span = (parts[start][0], parts[start + length - 1][1])
                if length <= _LONGEST or span[1] - span[0] <= _SHORT:
                    yield span, length

    def _priced(self, way: Way) -> Choice | None:
        if way not in self._choices:
            self._choices[way] = priced(self.pricer, self.base, way)
        return self._choices[way]

    def _best(self, span: Segment, length: int, prices: Mapping[int, float]) -> Way:
        program = self._program(span, length)
        if not program.needed:
            return ()
        first, last = program.window
        if any(first <= instant < last for instant in prices):
            program = self._program(span, _STAGES)
        if program.columns > _WIDTH:
            return ()
        cost = program.costs(prices)
        key = (self._structure(span), cost.tobytes())
        if key not in self._solved:
            self._solved[key] = (span, program.best(cost))
            self._work += program.columns**2
        source, way = self._solved[key]
        return way if source == span else moved(self.pricer.possible, way, source, span)

    def _program(self, span: Segment, stages: int) -> StagedSegment:
        key = (span, stages)
        if key not in self._programs:
            self._programs[key] = StagedSegment(self.pricer, span, stages)
        return self._programs[key]

    def _structure(self, span: Segment) -> Hashable:
        if span not in self._structures:
            self._structures[span] = segment_structure(self.pricer.possible, span)
        return self._structures[span]
