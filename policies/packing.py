"""Chooses disjoint recomputations: least time, with memory at every instant as the constraint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, hstack, vstack

from actckpt.plan import Burst, Plan, Region
from actckpt.policies.shared_holds import Hold, joined
from actckpt.pricing.simulate import Estimate, Pricer

_ROUNDS = 20
# nodes times columns, not seconds: the same question must have the same answer on a busy machine
_NODES = 20_000
_GAP = 4e-3
# where any solution will do
_ANY = 1e3
# a guard for huge programs: those of ordinary models end by nodes, long before
_LIMIT_S = 20.0
_CLOSE = 5e-3
_TRIES = 4
# less than this share of the budget is not worth another try
_CREDIT = 3e-3
# columns of the integer program: those that the linear one likes best
_COLUMNS = 500
# of the choices for one thing, those that are best at some of these prices of a byte
_FEW = 12
_INSTANTS = 24
# of smaller parts of the peak it does not matter that one drops what another reads
_SMALL = 4000
_SCALES = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0, 1.8, 3.0, 6.0, 20.0)
_SHARES = (0.0, 0.3, 0.6, 0.9, 1.0)


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
    delta: np.ndarray
    holds: tuple[Hold, ...] = ()


def plan_of(parts: Sequence[Region | Burst]) -> Plan:
    """The plan of these regions or bursts."""
    return Plan(
        "",
        tuple(p for p in parts if isinstance(p, Region)),
        bursts=tuple(p for p in parts if isinstance(p, Burst)),
    )


class Packing:
    """A choice for everything that is taken at most once.

    The memory of a step is the untouched timeline plus what each choice changes, plus once each
    activation that bursts hold for themselves: one column that is 1 as soon as a reader is chosen,
    or, where autograd saves it in any case, a reader and a choice that drops it. Exact until
    backward begins (tests/test_packing.py), nearly so after; what is missing is added to the next
    round. Instants enter the program as they turn out to bind.
    """

    def __init__(self, pricer: Pricer, choices: Sequence[Choice]) -> None:
        self.pricer = pricer
        self.choices = list(choices)
        base = pricer.estimate(Plan(""))
        self.base = base.timeline
        dropped = frozenset(s for c in self.choices for s in c.takes)
        held = joined([c.holds for c in self.choices], dropped)
        self.held = {h: readers for h, readers in held.items() if self._shared(h, readers)}
        self.hold_deltas = [self._alone(hold) for hold in self.held]
        shared = {hold.storage for hold in self.held}
        # what a choice alone holds is its own
        self.deltas = [
            c.delta + self._alone(*(h for h in c.holds if not h.saved and h.storage not in shared))
            for c in self.choices
        ]

    def _shared(self, hold: Hold, readers: Sequence[int]) -> bool:
        """Whether it matters that several choices may hold it, or drop its save."""
        if hold.saved:
            return hold.bytes * _SMALL > int(self.base.max())
        return len({min(self.choices[j].takes) for j in readers}) > 1

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

    def _deltas(self, instants: Sequence[int]) -> np.ndarray:
        """Bytes that each column adds at each instant."""
        at = np.array(instants, dtype=np.int64)
        columns = (*self.deltas, *self.hold_deltas)
        return np.array([delta[at] for delta in columns], dtype=float).T

    def estimate(self, picked: Sequence[Choice]) -> Estimate:
        """The price of some choices together."""
        return self.pricer.estimate(plan_of([p for c in picked for p in c.parts]))

    def least_time(self, budget_bytes: int) -> Plan | None:
        """The fastest choice that fits, or None if none was found.

        What a solution turns out to need less than the sum of its parts says (regions that hold the
        same storage) is credited to the next try.
        """
        best, best_s = None, math.inf
        instants = self._binding(self.base, budget_bytes, [])
        credit = np.zeros(len(self.base), dtype=np.int64)
        for _ in range(_TRIES):
            found = self._solve(budget_bytes, instants, credit)
            if found is None:
                break
            picked, price = found
            if price.time_s >= best_s:
                break
            best, best_s = plan_of([p for c in picked for p in c.parts]), price.time_s
            credit = np.maximum(0, self.levels(picked) - price.timeline)
            if credit.max() < _CREDIT * budget_bytes:
                break
        return best

    def levels(self, picked: Sequence[Choice]) -> np.ndarray:
        """The level at each instant as the program sees it."""
        held = joined([c.holds for c in picked], frozenset(s for c in picked for s in c.takes))
        total: np.ndarray = sum((c.delta for c in picked), self.base) + self._alone(*held)
        return total

    def least_memory(self, known_bytes: int) -> Plan | None:
        """A choice of nearly the smallest peak, or None if none is below the known one.

        Begins at the smallest peak of the linear relaxation, asks for more until an integer
        solution is found, and bisects between that and what was refused last.
        """
        least = self._least_peak()
        if least is None:
            return None
        step = max(1.0, 2 * _CLOSE * least)
        asked, refused = least + step / 2, least
        instants: list[int] = []
        found: tuple[list[Choice], Estimate] | None = None
        while found is None and asked < known_bytes:
            found = self._solve(math.floor(asked), instants, self.base * 0, _ANY)
            if found is None:
                refused = asked
                asked += step
                step *= 2
        while found is not None and found[1].peak_bytes - refused > 2 * _CLOSE * known_bytes:
            asked = (refused + found[1].peak_bytes) / 2
            better = self._solve(math.floor(asked), instants, self.base * 0, _ANY)
            if better is None:
                refused = asked
            else:
                found = better
        return None if found is None else plan_of([p for c in found[0] for p in c.parts])

    def _least_peak(self) -> float | None:
        """The smallest peak of fractional choices, None if there is nothing to choose."""
        if not self.choices:
            return None
        limits, most = self._limits
        n = limits.shape[1]
        unit = max(1.0, float(self.base.max()))
        instants: list[int] = [int(np.argmax(self.base))]
        peak = 0.0
        bounds = np.array([(0.0, 1.0)] * n + [(0.0, np.inf)])
        for _ in range(_ROUNDS):
            rows = csr_array(self._deltas(instants) / unit)
            result = linprog(
                np.append(np.zeros(n), 1.0),
                A_ub=vstack(
                    [
                        hstack([limits, csr_array((limits.shape[0], 1))]),
                        hstack([rows, csr_array(-np.ones((len(instants), 1)))]),
                    ]
                ),
                b_ub=np.append(most, -self.base[np.array(instants)] / unit),
                bounds=bounds,
                method="highs",
            )
            if result.x is None:
                return None
            peak = float(result.x[-1]) * unit
            columns = (*self.deltas, *self.hold_deltas)
            level = self.base + sum(result.x[j] * columns[j] for j in np.nonzero(result.x[:n])[0])
            fresh = self._binding(level, math.ceil(peak * (1 + 1e-6)), instants)
            if not fresh:
                break
            instants.extend(fresh)
        return peak

    def _solve(
        self, budget_bytes: int, instants: list[int], credit: np.ndarray, gap: float = _GAP
    ) -> tuple[list[Choice], Estimate] | None:
        """Adds to ``instants`` until those decide it."""
        if not self.choices:
            return None
        for _ in range(_ROUNDS):
            picked = self._program(instants, budget_bytes + credit, gap)
            if picked is None:
                return None
            price = self.estimate(picked)
            if price.peak_bytes <= budget_bytes:
                return picked, price
            fresh = self._binding(price.timeline, budget_bytes, instants)
            # recomputations at the same instant may need more than the sum of the choices says
            over = price.timeline > budget_bytes
            short = np.minimum(credit, self.levels(picked) - price.timeline)
            tighter = np.where(over, short, credit)
            if not fresh and (tighter == credit).all():
                return None
            instants.extend(fresh)
            credit = tighter
        return None

    @staticmethod
    def _binding(levels: np.ndarray, budget_bytes: int, known: list[int]) -> list[int]:
        """The highest instants above the budget that are not known yet, far apart."""
        window = max(1, len(levels) // 64)
        found: list[int] = []
        for start in range(0, len(levels), window):
            at = start + int(np.argmax(levels[start : start + window]))
            if levels[at] > budget_bytes and at not in known:
                found.append(at)
        return found

    def _program(
        self, instants: list[int], budget_bytes: np.ndarray, gap: float
    ) -> list[Choice] | None:
        """The integer program over some instants: at most one choice per taken thing."""
        limits, most = self._limits
        n = len(self.choices)
        # whole numbers of small units: the solver's tolerances then decide nothing
        unit = max(1, int(self.base.max()) >> 20)
        at = np.array(instants, dtype=np.int64)
        deltas = np.ceil(self._deltas(instants) / unit)
        room = np.floor((budget_bytes[at] - self.base[at]) / unit)
        time_s = self._time_s / max(float(np.abs(self._time_s).max()), 1e-12)
        chosen = np.arange(n)
        if n > _COLUMNS and instants:
            likely = self._likely(deltas, room, time_s)
            if likely is None:
                return None
            chosen = likely
        columns = np.append(chosen, np.arange(n, limits.shape[1]))
        constraints = [LinearConstraint(limits[:, columns], -np.inf, most)]
        if instants:
            constraints.append(LinearConstraint(deltas[:, columns], -np.inf, room))
        result = milp(
            time_s[columns],
            constraints=constraints,
            integrality=columns < n,
            bounds=Bounds(0.0, 1.0),
            options={
                "node_limit": max(50, _NODES // len(columns)),
                "mip_rel_gap": gap,
                "time_limit": _LIMIT_S,
            },
        )
        if result.x is None:
            return None
        picked = zip(columns, result.x, strict=True)
        found = [self.choices[j] for j, x in picked if j < n and x > 0.5]
        return sorted(found, key=lambda c: min(c.takes))  # a plan's regions are in order

    def _likely(
        self, deltas: np.ndarray, room: np.ndarray, time_s: np.ndarray
    ) -> np.ndarray | None:
        """The choices of least reduced cost in the linear relaxation, or None if it is infeasible.

        The optimum hardly ever has others, and what it gives up for that the gap includes.
        """
        limits, most = self._limits
        result = linprog(
            time_s,
            A_ub=vstack([limits, csr_array(deltas)]),
            b_ub=np.concatenate([most, room]),
            bounds=(0.0, None),
            method="highs",
        )
        if result.x is None:
            return None
        duals = result.ineqlin.marginals
        reduced = time_s - limits.T @ duals[: len(most)] - deltas.T @ duals[len(most) :]
        reduced = reduced[: len(self.choices)]
        return np.sort(np.lexsort((np.arange(len(reduced)), reduced))[:_COLUMNS])


def undominated(
    choices: Sequence[tuple[int, Choice]], tolerance_bytes: int = 0
) -> list[tuple[int, Choice]]:
    """Those that lower something, and for which no other one takes no more, is as fast and nowhere
    higher by more than the tolerance."""
    kept: list[tuple[int, Choice]] = []
    levels = np.empty((0, 0))
    for index, c in sorted(choices, key=lambda x: (x[1].time_s, len(x[1].takes), x[0])):
        if c.delta.min(initial=0) >= 0:
            continue
        if kept:
            lower = (levels <= c.delta + tolerance_bytes).all(axis=1)
            if any(
                kept[j][1].takes <= c.takes and set(kept[j][1].holds) <= set(c.holds)
                for j in np.nonzero(lower)[0]
            ):
                continue
        kept.append((index, c))
        levels = c.delta[None] if len(kept) == 1 else np.concatenate([levels, c.delta[None]])
    return kept


def spread(choices: Sequence[tuple[int, Choice]], at: int) -> list[tuple[int, Choice]]:
    """Those that are the best at some price of a byte at ``at`` and at another instant each.

    Args:
        at: the instant at which nearly every budget binds: the end of the forward pass.
    """
    if len(choices) <= _FEW:
        return list(choices)
    alone = np.array([c.delta for _, c in choices], dtype=float)
    for row, (_, c) in zip(alone, choices, strict=True):
        for hold in c.holds:
            if not hold.saved:
                hold.added_to(row)
    best: set[int] = set()
    # with all that they hold, and with nothing of what others may hold for them
    for levels in (alone, np.array([c.delta for _, c in choices], dtype=float)):
        best.update(_best(levels, np.array([c.time_s for _, c in choices]), at))
    return [choices[j] for j in sorted(best)]


def _best(levels: np.ndarray, time_s: np.ndarray, at: int) -> set[int]:
    spans = levels.max(axis=0) - levels.min(axis=0)
    moved = np.nonzero(spans)[0]
    moved = moved[np.linspace(0, len(moved) - 1, _INSTANTS).astype(int)]
    slope = (time_s.max() - time_s.min()) / max(1.0, float(spans[at]))
    best: set[int] = set()
    for scale in _SCALES:
        for other in _SHARES:
            prices = scale * slope * ((1 - other) * levels[:, [at]] + other * levels[:, moved])
            best.update(np.argmin(time_s[:, None] + prices, axis=0).tolist())
    return best
