"""The fastest schedule of a chain for every budget at once: Rotor's dynamic program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actckpt.policies.solver.chain import NEVER_S, Again, Chain, Kept, Schedule, Way

# split points that are tried of a long span, half of them at its ends
_SPLITS = 16
_NEVER = np.float32(np.inf)


@dataclass(frozen=True, slots=True)
class _Option:
    """What a span may begin with: stages that are kept in a way, or a part that runs again alone.

    Attributes:
        last: its last stage.
        needs_bytes: the budget below which it cannot be.
        held: units that it holds while what follows it is dealt with.
        seconds: what it costs; one number, or one for each number of units.
        way: None for a part that runs again.
    """

    last: int
    needs_bytes: int
    held: int
    seconds: np.ndarray | float
    way: Way | None = None

    def at(self, units: int) -> float:
        """What it costs there."""
        return float(self.seconds[units] if isinstance(self.seconds, np.ndarray) else self.seconds)


class ChainProgram:
    """The least extra seconds of a step for every budget up to the largest, in units of bytes.

    ``_again[d][i, u]`` is what backward over the stages i to i + d takes in ``u`` units if only
    their input is held, the first run of the part apart: its first stages are kept in a way while
    the rest is dealt with, or are themselves a part that is run again once backward gets there.
    O(n^2 units) memory, O(n^3 units) time, O(n^2 units) where long spans are split at some points
    only. Optimal on chains, among schedules that keep what they keep of a stage until backward has
    passed it (Beaumont et al.'s persistent ones), up to the rounding of bytes to units.

    Args:
        most_bytes: the largest budget that will be asked for.
        units: in how many what lies between that and the lowest level is counted; what is held is
            rounded up.
        splits: None tries every split point.

    References:
        Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019, Optimal checkpointing for
        heterogeneous chains: how to train deep neural networks with limited memory (Rotor).
        Zhao, Le Hellard, Eyraud-Dubois, Gusak, Beaumont 2023, Rockmate: an efficient, fast,
        automatic and generic tool for re-materialization in PyTorch (several ways of a block).
        Griewank and Walther 2000, Algorithm 799: revolve.
    """

    def __init__(
        self, chain: Chain, most_bytes: int, units: int, splits: int | None = _SPLITS
    ) -> None:
        self.chain = chain
        self._splits = splits
        self._floor_bytes = chain.floor_bytes
        span_bytes = max(0, most_bytes - self._floor_bytes)
        self.unit_bytes = max(1, -(-span_bytes // units))
        self._width = span_bytes // self.unit_bytes + 1
        steps = np.arange(self._width, dtype=np.int64) * self.unit_bytes
        self._budgets = self._floor_bytes + steps
        self._edge = self._units(chain.out_bytes)
        self._total_s = np.concatenate([[0.0], np.cumsum(chain.again_s)])
        self._over = self._forward_peaks()
        self._again: list[np.ndarray] = []
        # the same for what follows a part whose output is held
        self._after: list[np.ndarray] = []
        for more in range(len(chain)):
            self._again.append(self._spans(more))
            self._after.append(self._behind(more))
        self._first = self._first_pass()

    # ---- answers

    @property
    def least_bytes(self) -> int | None:
        """The smallest budget for which there is a schedule; None if there is none."""
        possible = np.flatnonzero(self._first[0] < NEVER_S)
        return int(self._budgets[possible[0]]) if len(possible) else None

    def extra_s(self, budget_bytes: int) -> float:
        """Seconds that a step takes longer; infinite where nothing fits."""
        units = self._units_in(budget_bytes)
        found = float(self._first[0][units]) if units >= 0 else math.inf
        return found if found < NEVER_S else math.inf

    def schedule(self, budget_bytes: int) -> Schedule | None:
        """The fastest schedule within a budget, or None where nothing fits."""
        units = self._units_in(budget_bytes)
        if units < 0 or self._first[0][units] >= NEVER_S:
            return None
        return self._chosen(0, len(self.chain) - 1, units, first_pass=True)

    def _units_in(self, budget_bytes: int) -> int:
        return min((budget_bytes - self._floor_bytes) // self.unit_bytes, self._width - 1)

    def _units(self, size: int | np.ndarray) -> np.ndarray:
        return -(-np.asarray(size, dtype=np.int64) // self.unit_bytes)

    def _chosen(self, first: int, last: int, units: int, *, first_pass: bool) -> Schedule:
        """The schedule that the tables stand for."""
        found: list[Kept | Again] = []
        while first <= last:
            options = self._first_options(first) if first_pass else self._options(first, last)
            possible = (
                (option.at(units) + rest, number, option)
                for number, option in enumerate(options)
                if option.held <= units and option.needs_bytes <= self._budgets[units]
                for rest in [self._rest_s(option, last, units, first_pass=first_pass)]
            )
            _, _, option = min(possible, key=lambda x: x[:2])
            if option.way is not None:
                found.append(Kept(first, option.way))
            else:
                inside = self._chosen(first, option.last, units, first_pass=False)
                found.append(Again(first, option.last, inside))
            first, units = option.last + 1, units - option.held
        return tuple(found)

    def _rest_s(self, option: _Option, last: int, units: int, *, first_pass: bool) -> float:
        """What the stages behind an option take."""
        left, begin = units - option.held, option.last + 1
        if first_pass:
            return float(self._first[begin][left])
        return float(self._again[last - begin][begin, left]) if begin <= last else 0.0

    # ---- the tables

    def _replay_s(self, first: int | np.ndarray, last: int | np.ndarray) -> np.ndarray:
        """Running the stages from some to others again, keeping nothing; single precision."""
        chain = self.chain
        whole = self._total_s[last] - self._total_s[first]
        return np.asarray(whole + chain.last_s[last] + chain.node_s, dtype=np.float32)

    def _forward_peaks(self) -> np.ndarray:
        """``[i, j]``: the most that running the stages i to j takes, nothing being kept."""
        chain, count = self.chain, len(self.chain)
        found = np.zeros((count, count), dtype=np.int64)
        read = np.concatenate([[0], chain.out_bytes[:-1]]).astype(np.int64)
        for i in range(count):
            needs = chain.forward_bytes[i:] + read[i:]
            needs[0] = chain.forward_bytes[i]  # its input is held outside
            found[i, i:] = np.maximum.accumulate(needs)
        return found

    def _cuts(self, more: int) -> list[int]:
        """Lengths of the part that a span of ``more`` + 1 stages may begin with."""
        if self._splits is None or more <= 2 * self._splits:
            return list(range(1, more + 1))
        near, tries = self._splits // 2, self._splits
        ends = [*range(1, near + 1), *range(more + 1 - near, more + 1)]
        spread = [*np.geomspace(near, more, tries), *np.linspace(1, more, tries)]
        return sorted({*ends, *(round(x) for x in spread)})

    def _options(self, first: int, last: int) -> Iterator[_Option]:
        """What the stages ``first`` to ``last``, which run again, may begin with."""
        chain = self.chain
        before = int(chain.before_bytes[last])
        for way, peak in zip(chain.ways_of(first), chain.peaks_bytes[first], strict=True):
            end = first + way.stages - 1
            if end > last:
                continue
            needs = max(peak, before + way.forward_bytes)
            if end == last:
                yield _Option(end, needs, 0, way.last_s, way)
            else:
                held = int(self._units(way.rest_bytes + chain.out_bytes[end]))
                yield _Option(end, needs, held, way.inside_s + float(chain.edge_s[end]), way)
        for length in self._cuts(last - first):
            end = first + length - 1
            seconds = self._again[length - 1][first] + self._replay_s(first, end)
            seconds += np.float32(chain.edge_s[end])
            needs = before + int(self._over[first, end])
            yield _Option(end, needs, int(self._edge[end]), seconds)

    def _spans(self, more: int) -> np.ndarray:
        """`_options` of all spans of ``more`` + 1 stages at once: the best of each."""
        chain, budgets = self.chain, self._budgets
        count = len(chain) - more
        starts = np.arange(count)
        before = chain.before_bytes[more:]
        best = np.full((count, self._width), _NEVER, np.float32)
        kinds = np.array(chain.kinds[:count])
        for kind, ways in enumerate(chain.ways):
            rows = starts[kinds == kind]
            for number, way in enumerate(ways if len(rows) else ()):
                if way.stages > more + 1:
                    continue
                peaks = np.array([chain.peaks_bytes[b][number] for b in rows])
                needs = np.maximum(peaks, before[rows] + way.forward_bytes)
                found = self._with_way(rows, way, more)
                found[budgets < needs[:, None]] = _NEVER
                best[rows] = np.minimum(best[rows], found)
        for length in self._cuts(more):
            ends = starts + length - 1
            found = self._again[length - 1][:count] + self._after[more - length][length:][:count]
            found += self._replay_s(starts, ends)[:, None]
            found[budgets < (before + self._over[starts, ends])[:, None]] = _NEVER
            np.minimum(best, found, out=best)
        return best

    def _with_way(self, rows: np.ndarray, way: Way, more: int) -> np.ndarray:
        """Spans that begin with some stages kept in a way."""
        chain, size = self.chain, way.stages
        found = np.full((len(rows), self._width), _NEVER, np.float32)
        if size == more + 1:
            found[:] = way.last_s
            return found
        ends = rows + size - 1
        held = self._units(way.rest_bytes + chain.out_bytes[ends])
        seconds = (way.inside_s + chain.edge_s[ends]).astype(np.float32)
        rest = self._again[more - size]
        for units in np.unique(held):
            if units < self._width:
                same = held == units
                behind = rest[rows[same] + size, : self._width - units]
                found[same, units:] = behind + seconds[same, None]
        return found

    def _behind(self, more: int) -> np.ndarray:
        """Spans of ``more`` + 1 stages whose input is held by what comes before them."""
        spans = self._again[more]
        found = np.full(spans.shape, _NEVER, np.float32)
        for units in np.unique(self._edge):
            starts = 1 + np.flatnonzero(self._edge[: len(spans) - 1] == units)
            if units < self._width and len(starts):
                edge_s = self.chain.edge_s[starts - 1].astype(np.float32)
                found[starts, units:] = spans[starts, : self._width - units] + edge_s[:, None]
        return found

    def _first_options(self, first: int) -> Iterator[_Option]:
        """What the stages from ``first`` on may begin with in the first pass."""
        chain, edge = self.chain, self._edge
        for way, peak in zip(chain.ways_of(first), chain.peaks_bytes[first], strict=True):
            end = first + way.stages - 1
            if end < len(chain):
                needs = max(peak, int(chain.first_bytes[first : end + 1].max()))
                held = int(self._units(way.rest_bytes + chain.out_bytes[end]))
                yield _Option(end, needs, held, way.first_s, way)
        needs = 0
        for end in range(first, len(chain)):
            needs = max(needs, int(chain.first_bytes[end]))
            seconds = self._again[end - first][first] + self._replay_s(first, end)
            yield _Option(end, needs, int(edge[end]), seconds)

    def _first_pass(self) -> list[np.ndarray]:
        """The least seconds from each stage on, the first pass over it being still to come."""
        count, budgets = len(self.chain), self._budgets
        found = [np.full(self._width, _NEVER, np.float32) for _ in range(count + 1)]
        found[count][budgets >= self.chain.after_bytes] = 0
        for stage in range(count - 1, -1, -1):
            best = found[stage]
            for option in self._first_options(stage):
                begin = max(option.held, int(np.searchsorted(budgets, option.needs_bytes)))
                if begin >= self._width:
                    continue
                left = found[option.last + 1][begin - option.held : self._width - option.held]
                seconds = option.seconds
                own = seconds[begin:] if isinstance(seconds, np.ndarray) else np.float32(seconds)
                best[begin:] = np.minimum(best[begin:], left + own)
        return found
