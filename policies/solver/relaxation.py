"""The linear relaxation of a packing: how low and how fast, and what a byte is worth when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack, vstack

from actckpt.policies.solver.run_lengths import Levels
from actckpt.policies.solver.work import Work

# an instant of each enters at a time
_WINDOWS = 64
# far more instants than programs end with: nothing may go on for ever
_INSTANTS = 20 * _WINDOWS
_SLIGHT = 1e-12


@dataclass(frozen=True, slots=True)
class Relaxed:
    """A solution of the linear program.

    Attributes:
        value: its objective: seconds added to a step, or the peak in bytes.
        prices: instant -> by how much the objective falls with a byte more of room there.
        reduced: of each column, by how much the objective rises at least if it is chosen.
    """

    value: float
    prices: dict[int, float]
    reduced: np.ndarray


class Relaxation:
    """The linear program over some columns; instants enter as they turn out to bind.

    Args:
        limits, most: what holds of the columns at every instant: rows, right-hand sides.
        time_s: of each column.
        base: bytes at each instant without any.
        deltas: bytes that each column adds at each instant.
        instants: to begin with; those that bind are added.
        least: what each column is at least.
        work: of which each program takes a part.
    """

    def __init__(
        self,
        limits: csr_array,
        most: np.ndarray,
        time_s: np.ndarray,
        base: np.ndarray,
        deltas: Sequence[Levels],
        instants: list[int],
        least: np.ndarray,
        work: Work,
    ) -> None:
        self.limits = limits
        self.most = most
        self.time_s = time_s
        self.base = base
        self.deltas = deltas
        self.instants = instants
        self.least = least
        self.work = work
        self.unit = max(1.0, float(base.max(initial=0)))
        if not instants and len(base):
            instants.append(int(np.argmax(base)))

    def least_time(self, budget_bytes: int) -> Relaxed | None:
        """The fastest fractional choice within the budget, None if there is none."""
        if not self.deltas:
            fits = self.base.max(initial=0) <= budget_bytes
            return Relaxed(0.0, {}, np.zeros(0)) if fits else None
        scale_s = max(float(np.abs(self.time_s).max(initial=0)), _SLIGHT)
        while True:
            rows = self._rows()
            room = (budget_bytes - self.base[np.array(self.instants)]) / self.unit
            result = linprog(
                self.time_s / scale_s,
                A_ub=vstack([self.limits, rows]),
                b_ub=np.concatenate([self.most, room]),
                bounds=np.column_stack((self.least, np.full(len(self.least), np.inf))),
                method="highs",
            )
            self.work.spend_linear(self.limits.shape[0], self.limits.shape[1], result.nit)
            if result.x is None:
                return None
            if not self._extended(result.x, budget_bytes):
                break
        duals = scale_s * result.ineqlin.marginals
        reduced = self.time_s - self._shadow(duals, rows)
        prices = {at: price / self.unit for at, price in self._prices(duals, scale_s).items()}
        return Relaxed(result.fun * scale_s, prices, reduced)

    def least_peak(self) -> Relaxed | None:
        """The smallest peak of fractional choices, None if the solver finds none."""
        if not self.deltas:
            return Relaxed(float(self.base.max(initial=0)), {}, np.zeros(0))
        n = self.limits.shape[1]
        bounds = np.column_stack((np.append(self.least, 0.0), np.append(np.ones(n), np.inf)))
        while True:
            rows = self._rows()
            result = linprog(
                np.append(np.zeros(n), 1.0),
                A_ub=vstack(
                    [
                        hstack([self.limits, csr_array((self.limits.shape[0], 1))]),
                        hstack([rows, csr_array(-np.ones((len(self.instants), 1)))]),
                    ]
                ),
                b_ub=np.append(self.most, -self.base[np.array(self.instants)] / self.unit),
                bounds=bounds,
                method="highs",
            )
            self.work.spend_linear(self.limits.shape[0], self.limits.shape[1], result.nit)
            if result.x is None:
                return None
            peak = float(result.x[-1]) * self.unit
            if not self._extended(result.x[:n], peak * (1 + 1e-6)):
                break
        duals = result.ineqlin.marginals
        return Relaxed(peak, self._prices(duals, 1.0), -self._shadow(duals, rows))

    def _rows(self) -> csr_array:
        at = np.array(self.instants, dtype=np.int64)
        return csr_array(np.array([d.at(at) for d in self.deltas], dtype=float).T / self.unit)

    def _extended(self, x: np.ndarray, most_bytes: float) -> bool:
        """Whether a solution is too high somewhere, which is then an instant of the program."""
        if len(self.instants) >= _INSTANTS:
            return False
        level = self.base + sum(x[j] * self.deltas[j].whole() for j in np.nonzero(x)[0])
        fresh = binding(level, most_bytes, self.instants)
        self.instants.extend(fresh)
        return bool(fresh)

    def _shadow(self, duals: np.ndarray, rows: csr_array) -> np.ndarray:
        """Of each column, what the rows that it takes part in make of it."""
        count = len(self.most)
        found: np.ndarray = self.limits.T @ duals[:count] + rows.T @ duals[count:]
        return found

    def _prices(self, duals: np.ndarray, scale: float) -> dict[int, float]:
        """Instant -> its dual, of those that bind."""
        levels = zip(self.instants, duals[len(self.most) :], strict=True)
        return {at: float(-dual) for at, dual in levels if -dual > _SLIGHT * scale}


def binding(levels: np.ndarray, most_bytes: float, known: Sequence[int]) -> list[int]:
    """The highest instants above what there may be that are not known yet, far apart."""
    window = max(1, len(levels) // _WINDOWS)
    found: list[int] = []
    for start in range(0, len(levels), window):
        at = start + int(np.argmax(levels[start : start + window]))
        if levels[at] > most_bytes and at not in known:
            found.append(at)
    return found
