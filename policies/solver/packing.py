"""Chooses disjoint recomputations: least time, with memory at every instant as the constraint."""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_array, hstack, vstack

from actckpt.data.plan import Burst, Plan, Region
from actckpt.policies.solver.relaxation import Relaxation, binding
from actckpt.policies.solver.run_lengths import Levels
from actckpt.policies.solver.shared_holds import Hold, joined
from actckpt.policies.solver.solver_output import milp
from actckpt.policies.solver.work import Work
from actckpt.pricing.simulate import Estimate, Pricer

_ROUNDS = 20
# nodes times columns, not seconds: the same question must have the same answer on a busy machine
_NODES = 100_000
_GAP = 4e-3
# how near the smallest peak is good enough, and what a step's time counts beside it
_CLOSE = 5e-3
_FASTER = 1e-3
_TRIES = 4
# less than this share of the budget is not worth another try
_CREDIT = 3e-3
# columns of the integer program, those that the linear one likes best: few at first, more where
# that was easy; never so many if it has many rows
_COLUMNS = (100, 200, 500)
_FEWEST = 100
_CELLS = 500_000
# of smaller parts of the peak it does not matter that one drops what another reads
_SMALL = 4000
# solved, or shown to have no solution
_ENDED = (0, 2)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to recompute something: what it takes, what it adds to the time and to each instant.

    Args:
        takes: numbers of what no two choices of a plan may both take, in forward order.
        parts: the regions or bursts that it consists of.
        delta: bytes, without the holds.
        holds: what other choices may hold, too; together they hold it once.
    """

    takes: frozenset[int]
    parts: tuple[Region, ...] | tuple[Burst, ...]
    time_s: float
    delta: Levels
    holds: tuple[Hold, ...] = ()


def plan_of(picked: Sequence[Choice]) -> Plan:
    """The plan of these choices, without a policy's name."""
    parts = [part for choice in picked for part in choice.parts]
    return Plan(
        "",
        tuple(p for p in parts if isinstance(p, Region)),
        bursts=tuple(p for p in parts if isinstance(p, Burst)),
    )


class _Problem(NamedTuple):
    """An integer program: its columns and their costs; rows, and what these are at most.

    Columns of the packing come first.
    """

    columns: np.ndarray
    cost: np.ndarray
    conditions: csr_array
    most: np.ndarray


class Packing:
    """A choice for everything that is taken at most once.

    The memory of a step is the untouched timeline plus what each choice changes, plus once each
    activation that bursts hold for themselves: one column that is 1 as soon as a reader is chosen,
    or, where autograd saves it in any case, a reader and a choice that drops it. Exact until
    backward begins (tests/test_packing.py), nearly so after; what is missing is added to the next
    round. Instants enter the program as they turn out to bind.

    Args:
        instants: those to begin with.
        settled: so many of the first choices are chosen; none of them excludes another.
        made: levels that an earlier packing has made.
        work: of which each program takes a part; once it is spent, no more than one is solved.
    """

    def __init__(
        self,
        pricer: Pricer,
        choices: Sequence[Choice],
        instants: Sequence[int] = (),
        settled: int = 0,
        made: dict[Hashable, Levels] | None = None,
        work: Work | None = None,
    ) -> None:
        self.pricer = pricer
        self.work = Work() if work is None else work
        self._made: dict[Hashable, Levels] = {} if made is None else made
        self.settled = settled
        self.instants = list(instants)
        self.choices = list(choices)
        base = pricer.estimate(Plan(""))
        self.untouched_s = base.time_s
        self.base = base.timeline
        dropped = frozenset(s for c in self.choices for s in c.takes)
        held = joined([c.holds for c in self.choices], dropped)
        self.held = {h: readers for h, readers in held.items() if self._shared(h, readers)}
        self.hold_deltas = [self._once(hold, None, hold) for hold in self.held]
        shared = {hold.storage for hold in self.held}
        self.deltas = [self._own(choice, shared) for choice in self.choices]

    def _shared(self, hold: Hold, readers: Sequence[int]) -> bool:
        """Whether it matters that several choices may hold it, or drop its save."""
        if hold.saved:
            return hold.bytes * _SMALL > int(self.base.max())
        return len({min(self.choices[j].takes) for j in readers}) > 1

    def _own(self, choice: Choice, shared: Container[int]) -> Levels:
        """Bytes that a choice adds at each instant, with what it alone holds."""
        own = [h for h in choice.holds if not h.saved and h.storage not in shared]
        return self._once((choice.parts, *own), choice.delta, *own) if own else choice.delta

    def _once(self, key: Hashable, own: Levels | None, *holds: Hold) -> Levels:
        if key not in self._made:
            held = self._alone(*holds)
            self._made[key] = Levels.of(held if own is None else held + own.whole())
        return self._made[key]

    def _alone(self, *holds: Hold) -> np.ndarray:
        levels = np.zeros_like(self.base)
        for hold in holds:
            hold.added_to(levels)
        return levels

    @cached_property
    def _limits(self) -> tuple[csr_array, np.ndarray]:
        """What holds of the columns (choices, then holds) at every instant: rows, right-hand sides.

        Nothing is taken twice; what has the same takers is one row. A choice's holds are held; of
        choices that exclude each other one row for all.
        """
        n = len(self.choices)
        takers: dict[int, list[int]] = {}
        for j, choice in enumerate(self.choices):
            for taken in choice.takes:
                takers.setdefault(taken, []).append(j)
        rows = [(dict.fromkeys(found, 1.0), 1.0) for found in sorted(map(tuple, takers.values()))]
        for k, (hold, found) in enumerate(self.held.items()):
            readers: dict[int, list[int]] = {}
            for j in found:
                readers.setdefault(min(self.choices[j].takes), []).append(j)
            droppers = takers.get(hold.storage, []) if hold.saved else []
            for group in readers.values():
                row = dict.fromkeys(sorted({*group, *droppers}), 1.0)
                rows.append((row | {n + k: -1.0}, 1.0 if droppers else 0.0))
        rows = list({tuple(row.items()): (row, most) for row, most in rows}.values())
        matrix = csr_array(
            (
                np.array([v for row, _ in rows for v in row.values()]),
                np.array([j for row, _ in rows for j in row], dtype=np.int64),
                np.cumsum([0, *(len(row) for row, _ in rows)]),
            ),
            shape=(len(rows), n + len(self.held)),
        )
        return matrix, np.array([most for _, most in rows])

    @cached_property
    def _time_s(self) -> np.ndarray:
        return np.array([c.time_s for c in self.choices] + [0.0] * len(self.held))

    @cached_property
    def _least(self) -> np.ndarray:
        """What each column is at least."""
        least = np.zeros(len(self._time_s))
        least[: self.settled] = 1.0
        return least

    @cached_property
    def _columns(self) -> tuple[Levels, ...]:
        """Bytes that each column adds at each instant."""
        return (*self.deltas, *self.hold_deltas)

    def joined_by(self, choices: Sequence[Choice]) -> Packing:
        """A packing of these choices, too."""
        both = [*self.choices, *choices]
        return Packing(self.pricer, both, self.instants, self.settled, self._made, self.work)

    def relaxation(self) -> Relaxation:
        """The linear program over the same columns; its instants are this one's, too."""
        limits, most = self._limits
        return Relaxation(
            limits,
            most,
            self._time_s,
            self.base,
            self._columns,
            self.instants,
            self._least,
            self.work,
        )

    def estimate(self, picked: Sequence[Choice]) -> Estimate:
        """The price of some choices together."""
        return self.pricer.estimate(plan_of(picked))

    def least_time(self, budget_bytes: int) -> Plan | None:
        """The plan of the fastest choices that fit, or None if none were found."""
        picked = self.fastest(budget_bytes)
        return None if picked is None else plan_of(picked)

    def fastest(self, budget_bytes: int) -> list[Choice] | None:
        """The fastest choices that fit, or None if none were found.

        What a solution turns out to need less than the sum of its parts says (regions that hold the
        same storage) is credited to the next try.
        """
        best: list[Choice] | None = None
        best_s = math.inf
        credit = np.zeros(len(self.base), dtype=np.int64)
        for _ in range(_TRIES):
            if best is not None and not self.work.is_left:
                break
            found = self._solve(budget_bytes, credit)
            if found is None:
                break
            picked, price = found
            if price.time_s >= best_s:
                break
            best, best_s = picked, price.time_s
            said = self.levels(picked)
            credit = np.maximum(0, said - price.timeline)
            # where there is room in any case more of it changes nothing
            tight = said >= (1 - _CREDIT) * budget_bytes
            if credit[tight].max(initial=0) < _CREDIT * budget_bytes:
                break
        return best

    def levels(self, picked: Sequence[Choice]) -> np.ndarray:
        """The level at each instant as the program sees it."""
        held = joined([c.holds for c in picked], frozenset(s for c in picked for s in c.takes))
        total: np.ndarray = sum((c.delta.whole() for c in picked), self.base) + self._alone(*held)
        return total

    def least_memory(self) -> Plan | None:
        """The plan of choices of nearly the smallest peak, or None if none were found."""
        picked = self.smallest()
        return None if picked is None else plan_of(picked)

    def smallest(self) -> list[Choice] | None:
        """Choices of nearly the smallest peak, or None if none were found."""
        relaxed = self.relaxation().least_peak() if self.choices else None
        if relaxed is None:
            return None
        best: list[Choice] | None = None
        best_bytes = 0
        short = np.zeros(len(self.base), dtype=np.int64)
        for _ in range(_ROUNDS):
            if best is not None and not self.work.is_left:
                break
            picked = self._program(relaxed.reduced, None, -short, _CLOSE)
            if picked is None:
                break
            price = self.estimate(picked)
            if best is None or price.peak_bytes < best_bytes:
                best, best_bytes = picked, price.peak_bytes
            said = self.levels(picked) + short
            most = int(said[np.array(self.instants)].max()) * (1 + _CLOSE)
            fresh = binding(price.timeline, most, self.instants)
            missing = np.where(price.timeline > most, price.timeline - said, 0)
            if not fresh and missing.max() <= 0:
                break
            self.instants.extend(fresh)
            short = np.maximum(short, short + missing)
        return best

    def _solve(self, budget_bytes: int, credit: np.ndarray) -> tuple[list[Choice], Estimate] | None:
        """A choice that fits as priced, however many instants that takes."""
        if not self.choices:
            return None
        relaxed = self.relaxation().least_time(budget_bytes + int(credit.max(initial=0)))
        if relaxed is None:
            return None
        for _ in range(_ROUNDS):
            picked = self._program(relaxed.reduced, budget_bytes, credit, _GAP)
            if picked is None:
                return None
            price = self.estimate(picked)
            if price.peak_bytes <= budget_bytes:
                return picked, price
            fresh = binding(price.timeline, budget_bytes, self.instants)
            # recomputations at the same instant may need more than the sum of the choices says
            over = price.timeline > budget_bytes
            missing = np.minimum(credit, self.levels(picked) - price.timeline)
            tighter = np.where(over, missing, credit)
            if not self.work.is_left or (not fresh and (tighter == credit).all()):
                return None
            self.instants.extend(fresh)
            credit = tighter
        return None

    def _program(
        self, reduced: np.ndarray, budget_bytes: int | None, credit: np.ndarray, gap: float
    ) -> list[Choice] | None:
        """The integer program over some instants: at most one choice per taken thing.

        Among few columns at first. What a program takes does not follow from its size, but one
        that had to branch takes much longer among more columns, and hardly gains by them.

        Args:
            reduced: of the columns in the linear program: the optimum hardly ever has others than
                those where this is least, and what it gives up for that the gap includes.
            budget_bytes: for the least time, or None for the smallest peak.
        """
        rows = self._limits[0].shape[0] + len(self.instants)
        count = len(self.choices) - self.settled
        order = np.lexsort((np.arange(count), reduced[self.settled : len(self.choices)]))
        best: list[Choice] | None = None
        tried = 0
        for step in _COLUMNS:
            most = min(step, count, max(_FEWEST, _CELLS // rows))
            problem = self._among(order[:most], budget_bytes, credit)
            if tried == most or (tried and not self.work.allows(problem.conditions)):
                break
            tried = most
            found, is_easy = self._solved(problem, gap)
            best = best if found is None else found
            if not is_easy:
                break
        return best

    def _among(self, open_to: np.ndarray, budget_bytes: int | None, credit: np.ndarray) -> _Problem:
        """The integer program whose columns are what is settled, some other choices, and holds."""
        limits, most = self._limits
        n, width = len(self.choices), limits.shape[1]
        # whole numbers of small units: the solver's tolerances then decide nothing
        unit = max(1, int(self.base.max()) >> 20)
        at = np.array(self.instants, dtype=np.int64)
        likely = np.append(np.arange(self.settled), self.settled + np.sort(open_to))
        columns = np.append(likely, np.arange(n, width))
        concerned = np.flatnonzero(np.diff(limits[:, likely].tocsr().indptr))
        limits, most = limits[concerned][:, columns], most[concerned]
        deltas = np.ceil(np.array([self._columns[j].at(at) for j in columns], dtype=float).T / unit)
        time_s = self._time_s[columns] / max(float(np.abs(self._time_s).max()), 1e-12)
        levels = (self.base[at] - credit[at]) / unit
        if budget_bytes is None:
            # one more column: the peak
            rows = hstack([csr_array(deltas), csr_array(-np.ones((len(at), 1)))])
            cost = np.append(_FASTER * time_s / max(1.0, float(time_s.sum())), 1.0 / (1 << 20))
            room = np.floor(-levels)
            limits = hstack([limits, csr_array((limits.shape[0], 1))])
        else:
            rows, cost = csr_array(deltas), time_s
            room = np.floor(budget_bytes / unit - levels)
        return _Problem(columns, cost, vstack([limits, rows]), np.concatenate([most, room]))

    def _solved(self, problem: _Problem, gap: float) -> tuple[list[Choice] | None, bool]:
        """What an integer program chooses, None if it found nothing; and whether that was easy."""
        columns, cost, conditions, most = problem
        n, more = len(self.choices), len(cost) - len(columns)
        upper = np.ones(len(cost))
        upper[len(columns) :] = np.inf
        result = milp(
            cost,
            constraints=LinearConstraint(conditions, -np.inf, most),
            integrality=np.append(columns < n, np.zeros(more)),
            bounds=Bounds(np.append(self._least[columns], np.zeros(more)), upper),
            options={
                "node_limit": min(
                    max(30, _NODES // len(columns)), self.work.nodes_left(conditions)
                ),
                "mip_rel_gap": gap,
            },
        )
        self.work.spend_integer(conditions, result.mip_node_count or 0)
        is_easy = result.status in _ENDED and (result.mip_node_count or 0) <= 1
        if result.x is None:
            return None, is_easy
        picked = zip(columns, result.x[: len(columns)], strict=True)
        found = [self.choices[j] for j, x in picked if j < n and x > 0.5]
        # a plan's regions are in order
        return sorted(found, key=lambda c: min(c.takes)), is_easy
