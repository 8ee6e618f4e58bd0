"""Chains as drawn, every schedule of one, and a step under a schedule run through slot by slot."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from actckpt.policies.solver.chain import Again, Chain, Kept, Schedule, Way

_BYTES = st.integers(0, 6)
# seconds that single precision holds exactly, also their sums
_SECONDS = st.integers(0, 64).map(float)


@st.composite
def chains(draw: st.DrawFn, most_stages: int = 4) -> Chain:
    """Chains of up to four stages of up to two kinds, with up to three ways each."""
    count = draw(st.integers(1, most_stages))
    kinds = tuple(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    way = st.builds(Way, st.integers(1, 2), _BYTES, _BYTES, _SECONDS, _SECONDS, _SECONDS)
    single = st.builds(Way, st.just(1), _BYTES, _BYTES, _SECONDS, _SECONDS, _SECONDS)
    # a schedule says which way by the way itself: no two are equal
    ways = tuple(
        tuple(
            dataclasses.replace(way, source=(kind, number))
            for number, way in enumerate((draw(single), *draw(st.lists(way, max_size=2))))
        )
        for kind in range(2)
    )
    peak = st.integers(0, 20)
    row = st.lists(_BYTES, min_size=count, max_size=count).map(np.array)
    seconds = st.lists(_SECONDS, min_size=count, max_size=count).map(np.array)
    return Chain(
        kinds=kinds,
        ways=ways,
        peaks_bytes=tuple(tuple(draw(peak) for _ in ways[k]) for k in kinds),
        before_bytes=draw(row),
        first_bytes=draw(row),
        forward_bytes=draw(row),
        out_bytes=draw(row),
        again_s=draw(seconds),
        last_s=draw(seconds),
        edge_s=draw(seconds),
        node_s=draw(_SECONDS),
        after_bytes=draw(_BYTES),
    )


def schedules(chain: Chain) -> Iterator[Schedule]:
    """Every schedule of the whole chain."""
    yield from _covers(chain, 0, len(chain) - 1, whole=True)


def _covers(chain: Chain, first: int, last: int, *, whole: bool) -> Iterator[Schedule]:
    """Every way to cover stages; a part that runs again has more than one in it, or ends as kept.

    Args:
        whole: the first pass, in which one part may be everything.
    """
    if first > last:
        yield ()
        return
    for way in chain.ways_of(first):
        if first + way.stages - 1 <= last:
            for rest in _covers(chain, first + way.stages, last, whole=whole):
                yield (Kept(first, way), *rest)
    for end in range(first, last + 1 if whole else last):
        inside = list(_covers(chain, first, end, whole=False))
        rests = list(_covers(chain, end + 1, last, whole=whole))
        for parts, rest in itertools.product(inside, rests):
            yield (Again(first, end, parts), *rest)


def run_through(chain: Chain, schedule: Schedule) -> tuple[int, float]:
    """(highest level, extra seconds) of a step under a schedule, event by event."""
    levels = [chain.after_bytes]
    held: list[tuple[Kept | Again, int]] = []
    seconds = 0.0
    resting = 0
    for part in schedule:
        stages = range(part.first, part.last + 1)
        levels += [resting + int(chain.first_bytes[s]) for s in stages]
        size = int(chain.out_bytes[part.last])
        if isinstance(part, Kept):
            size += part.way.rest_bytes
            seconds += part.way.first_s
        held.append((part, size))
        resting += size
    levels.append(resting + chain.after_bytes)
    for part, size in reversed(held):
        resting -= size
        seconds += _backward(chain, part, resting, levels)
    return max(levels), seconds


def _backward(chain: Chain, part: Kept | Again, resting: int, levels: list[int]) -> float:
    """Backward over a part, the first run of which is over; what is beside it stays as it is."""
    if isinstance(part, Kept):
        number = chain.ways_of(part.first).index(part.way)
        levels.append(resting + chain.peaks_bytes[part.first][number])
        return 0.0
    seconds = chain.node_s + float(chain.last_s[part.last])
    before = int(chain.before_bytes[part.last])
    held: list[tuple[Kept | Again, int]] = []
    for inner in part.inside:
        ends_it = inner.last == part.last
        if isinstance(inner, Kept):
            levels.append(before + resting + inner.way.forward_bytes)
            seconds += inner.way.last_s if ends_it else inner.way.inside_s
            size = 0 if ends_it else inner.way.rest_bytes + int(chain.out_bytes[inner.last])
        else:
            for stage in range(inner.first, inner.last + 1):
                read = int(chain.out_bytes[stage - 1]) if stage > inner.first else 0
                levels.append(before + resting + read + int(chain.forward_bytes[stage]))
            size = int(chain.out_bytes[inner.last])
        seconds += sum(float(chain.again_s[s]) for s in range(inner.first, inner.last + 1))
        if ends_it:
            seconds -= float(chain.again_s[part.last])
        else:
            seconds += float(chain.edge_s[inner.last])
        held.append((inner, size))
        resting += size
    for inner, size in reversed(held):
        resting -= size
        seconds += _backward(chain, inner, resting, levels)
    return seconds
