"""The best way to recompute one segment at given prices of memory: a program staged in backward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_array

from actckpt.data.plan import Burst
from actckpt.policies.solver.segments import Segment, born_in
from actckpt.policies.solver.solver_output import milp
from actckpt.pricing.simulate import Pricer

Row = tuple[list[tuple[int, float]], float]

_NODES = 1
_GAP = 2e-2
# of choices that cost the same, the one that makes results late: part of all prices, per stage
_LATE = 1e-3
_LESS = 1e-15
# nearer to a whole number than that is one
_INTEGRAL = 1e-6


class Solved(NamedTuple):
    """Columns that are 1, None where none were found; and whether no rounding made them."""

    chosen: np.ndarray | None
    whole: bool


class StagedSegment:
    """What one segment may keep, hold and make again, stage by stage of its backward pass.

    Stage 0 lasts from the forward pass until backward reaches the segment; every later one ends
    where backward begins to need other results. Each result is resident or not in each stage, each
    operation runs again or not at the beginning of each. A solution is a chain of bursts, each
    inside the one before it, so that what one makes can be handed to all later ones.

    Args:
        stages: at most so many after stage 0, of about equal bytes.

    References:
        Jain et al. 2020, Checkmate, section 4 (the staged program, here of one segment, with
        prices of memory instead of a limit).
    """

    def __init__(self, pricer: Pricer, segment: Segment, stages: int) -> None:
        self.pricer = pricer
        self.first = segment[0]
        possible = self.possible = pricer.possible
        saves = pricer.graph.saves
        self.needed = [s for s in born_in(possible, segment) if s in possible.saves]
        self.storages, self.ops = possible.reachable(self.needed, self.first)
        self.row_of = {s: n for n, s in enumerate(self.storages)}
        self.op_row = {i: len(self.storages) + n for n, i in enumerate(self.ops)}
        self.width = len(self.storages) + len(self.ops)
        self.used = {
            s: min(saves[k].first_use for k in possible.saves[s] if saves[k].first_use >= 0)
            for s in self.needed
        }
        self.released = {s: max(saves[k].released for k in possible.saves[s]) for s in self.needed}
        self.begins = self._begins(stages)
        self.columns = self.width * (len(self.begins) + 1)

    def _begins(self, stages: int) -> list[int]:
        """Operations at which the stages after the first begin."""
        size = self.pricer.bytes
        order = sorted(self.needed, key=lambda s: (self.used[s], s))
        total = sum(int(size[s]) for s in order) or 1
        found: list[int] = []
        passed = 0
        for s in order:
            if passed * stages >= len(found) * total and (not found or self.used[s] > found[-1]):
                found.append(self.used[s])
            passed += int(size[s])
        return found

    def _stage(self, instant: int) -> int:
        """The stage in which an operation of backward runs."""
        return bisect_right(self.begins, instant)

    @property
    def window(self) -> tuple[int, int]:
        """Operations of backward from the first need of a result until the last is let go of."""
        return min(self.used.values()), max(self.released.values())

    # ---- columns: what is resident in stage 0, what runs at its beginning (nothing), stage 1, ...

    def _resident(self, stage: int, sid: int) -> int:
        return stage * self.width + self.row_of[sid]

    def _runs(self, stage: int, op: int) -> int:
        return stage * self.width + self.op_row[op]

    def costs(self, prices: Mapping[int, float]) -> np.ndarray:
        """Seconds that each column costs.

        Args:
            prices: instant -> seconds that a byte costs there.
        """
        pricer, count = self.pricer, len(self.storages)
        stages = len(self.begins)
        size = pricer.bytes[self.storages].astype(float)
        died = pricer.died[self.storages]
        until = np.array([self.released.get(s, -1) for s in self.storages])
        let_go = np.array([self._stage(u - 1) if u >= 0 else -1 for u in until])
        cost = np.zeros((stages + 1, self.width))
        end = self.window[1]
        for instant, price in prices.items():
            stage = self._stage(instant)
            there = (died <= instant) & ((until > instant) | (let_go != stage))
            if instant < end:
                cost[stage, :count] += price * size * there
        cost[1:, :count] += _LATE * sum(prices.values()) / max(1, stages) * size
        stays = np.array([s in self.possible.stays for s in self.storages])
        cost[:, :count][:, stays] = 0.0
        cost[0, :count] += _LESS * size
        cost[1:, count:] = pricer.time_s[self.ops] + pricer.profile.burst_op_s
        saves = np.array([len(self.possible.saves.get(s, ())) for s in self.storages])
        # what is kept is a save that nobody has to drop and fill again
        cost[0, :count] -= pricer.profile.burst_save_s * saves
        return cost.ravel()

    # ---- rows

    @property
    def rows(self) -> int:
        """How many conditions the program has."""
        return int(self._limits.A.shape[0])

    @cached_property
    def _limits(self) -> LinearConstraint:
        rows = list(self._rows())
        matrix = csr_array(
            (
                [v for row, _ in rows for _, v in row],
                [c for row, _ in rows for c, _ in row],
                np.cumsum([0, *(len(row) for row, _ in rows)]),
            ),
            shape=(len(rows), self.columns),
        )
        return LinearConstraint(matrix, np.array([b for _, b in rows]), np.inf)

    def _rows(self) -> Iterator[Row]:
        for k in range(1, len(self.begins) + 1):
            for s in self.storages:
                before, now = self._resident(k - 1, s), self._resident(k, s)
                for m in self.possible.makers[s]:
                    yield [(before, 1.0), (self._runs(k, m), 1.0), (now, -1.0)], 0.0
            for i in self.ops:
                yield from self._inputs(k, i)
        for s in self.needed:  # autograd does not let go early
            for k in range(1, self._stage(self.released[s] - 1) + 1):
                yield [(self._resident(k, s), 1.0), (self._resident(0, s), -1.0)], 0.0

    def _inputs(self, stage: int, index: int) -> Iterator[Row]:
        """What an operation reads is resident, or made again just before."""
        possible, op = self.possible, self.pricer.graph.ops[index]
        runs = (self._runs(stage, index), -1.0)
        for s in possible.inputs(index).union(op.writes):
            if s not in self.row_of:
                continue
            finished = index > possible.last_write[s]
            there = [(self._resident(stage - 1, s), 1.0)] if finished else []
            for m in possible.makers[s]:
                if m < index:
                    yield [*there, (self._runs(stage, m), 1.0), runs], 0.0
        if op.random:
            for earlier in possible.earlier_draws(index):
                if earlier in self.op_row:
                    yield [(self._runs(stage, earlier), 1.0), runs], 0.0

    @cached_property
    def _bounds(self) -> Bounds:
        possible = self.possible
        least, most = np.zeros(self.columns), np.ones(self.columns)
        for i in self.ops:
            most[self._runs(0, i)] = 0.0
            if not possible.can_run(i):
                most[[self._runs(k, i) for k in range(1, len(self.begins) + 1)]] = 0.0
        for s in self.storages:
            if s not in possible.saves and possible.source(s) is None:
                most[self._resident(0, s)] = 0.0
        for s in self.needed:
            last = self._stage(self.released[s] - 1)
            for k in range(self._stage(self.used[s]), last + 1):
                least[self._resident(k, s)] = 1.0
        return Bounds(least, np.maximum(least, most))

    # ---- solving

    def solver(self, cost: np.ndarray, *, whole: bool = True) -> Callable[[], Solved]:
        """What finds the columns of least cost that are 1; it may run in any thread.

        Args:
            whole: else the linear program is solved and rounded, which takes a sixth of the time.
        """
        limits, bounds = self._limits, self._bounds

        def solve() -> Solved:
            result = milp(
                cost / (float(cost.max()) or 1.0),
                constraints=[limits],
                integrality=np.full(len(cost), int(whole)),
                bounds=bounds,
                options={"node_limit": _NODES, "mip_rel_gap": _GAP} if whole else {},
            )
            if result.x is None:
                return Solved(None, whole)
            chosen = result.x > 0.5
            return Solved(chosen, whole or bool(np.abs(result.x - chosen).max() < _INTEGRAL))

        return solve

    def bursts(self, chosen: np.ndarray) -> tuple[Burst, ...]:
        """The bursts of a solution; none if all is to be kept, or they cannot be."""
        possible = self.possible
        resident = [
            {s for s in self.storages if chosen[self._resident(k, s)]}
            for k in range(len(self.begins) + 1)
        ]
        saved = resident[0].intersection(self.needed) | possible.stays
        made: set[int] = set()
        chain: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for k in range(1, len(resident)):
            before = resident[k - 1]
            fresh = sorted(resident[k] - before - saved)
            there = (resident[0] & before) | possible.stays
            closure = possible.closure(fresh, self._may_pin(there), made & before)
            if closure is None:
                return ()
            if fresh:
                drops = [s for s in fresh if s in self.released and self._lasts(resident, s, k)]
                saves = sorted(j for s in drops for j in possible.saves[s])
                chain.append((closure[0], tuple(saves)))
                made |= set(fresh)
        inner: tuple[Burst, ...] = ()
        for ops, dropped in reversed(chain):
            inner = (Burst(ops, dropped, inner),)
        return inner

    def _may_pin(self, there: set[int]) -> Callable[[int], bool]:
        storages = self.possible.graph.storages
        return lambda sid: sid in there or storages[sid].born < self.first

    def _lasts(self, resident: list[set[int]], sid: int, stage: int) -> bool:
        """Whether what is made at a stage is there until backward is done with it."""
        last = self._stage(self.released[sid] - 1)
        return stage <= last and all(sid in resident[k] for k in range(stage, last + 1))
