"""Choices made better a few segments at a time, everything else staying as it was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actckpt.policies.solver.columns import Columns
from actckpt.policies.solver.packing import Choice, Packing
from actckpt.policies.solver.segments import Segment

# segments that are chosen anew together, and how far apart such windows begin
_WINDOW = 6
_STRIDE = 3
_SWEEPS = 3
_ROUNDS = 3
# less of a step's time is not worth an integer program, or another sweep
_GAIN = 1e-3


def improved(
    packing: Packing, columns: Columns, picked: Sequence[Choice], budget_bytes: int
) -> list[Choice]:
    """Choices that fit and are no slower than those given, which fit.

    The linear program's prices are those of a mixture of choices; where few large segments share a
    tight budget, what is best beside whole choices is something else. Window by window the rest is
    settled, the window's segments are chosen at what memory is worth beside it, and a small integer
    program decides.

    References:
        Shaw 1998, Using constraint programming and local search methods to solve vehicle routing
        problems (large neighbourhood search).
    """
    found = list(picked)
    time_s = packing.estimate(found).time_s
    worth_s = _GAIN * columns.base.time_s
    for _ in range(_SWEEPS):
        before_s = time_s
        for window in _windows(columns.segments):
            if not columns.work.is_left:
                return found
            packing, better = _anew(packing, columns, found, window, budget_bytes, worth_s)
            better_s = packing.estimate(better).time_s
            if better_s < time_s:
                found, time_s = better, better_s
        if time_s > before_s - worth_s:
            break
    return found


def _windows(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Operations ``[first, last)`` of some segments in a row, from the last ones on."""
    for end in range(len(segments), 0, -_STRIDE):
        begin = max(0, end - _WINDOW)
        yield segments[begin][0], segments[end - 1][1]
        if begin == 0:
            return


def _anew(
    packing: Packing,
    columns: Columns,
    picked: list[Choice],
    window: Segment,
    budget_bytes: int,
    worth_s: float,
) -> tuple[Packing, list[Choice]]:
    """The packing with what was found on the way, and the choices with a window's chosen anew."""
    storages, (first, last) = packing.pricer.graph.storages, window
    rest = [c for c in picked if not any(first <= storages[s].born < last for s in c.takes)]
    taken = frozenset(s for c in rest for s in c.takes)
    free = [c for c in packing.choices if not c.takes & taken]
    spare = Packing(
        packing.pricer, [*rest, *free], packing.instants, settled=len(rest), work=packing.work
    )
    relaxed = spare.relaxation().least_time(budget_bytes)
    for _ in range(_ROUNDS):
        if relaxed is None:
            return packing, picked
        fresh = [
            c
            for c in columns.at(relaxed.prices, spare.choices, window)
            if not c.takes & taken  # segments overlap in what they may drop
        ]
        if not fresh:
            break
        packing, spare = packing.joined_by(fresh), spare.joined_by(fresh)
        relaxed = spare.relaxation().least_time(budget_bytes)
    if relaxed is None or relaxed.value > sum(c.time_s for c in picked) - worth_s:
        return packing, picked
    return packing, spare.fastest(budget_bytes) or picked
