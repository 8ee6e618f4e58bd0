"""The linear relaxation of a packing: how low and how fast, and what a byte is worth when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack, vstack

_ROUNDS = 20
_WINDOWS = 64
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
    """

    def __init__(
        self,
        limits: csr_array,
        most: np.ndarray,
        time_s: np.ndarray,
        base: np.ndarray,
        deltas: Sequence[np.ndarray],
        instants: list[int],
    ) -> None:
        self.limits = limits
        self.most = most
        self.time_s = time_s
        self.base = base
        self.deltas = deltas
        self.instants = instants
        self.unit = max(1.0, float(base.max(initial=0)))
        if not instants and len(base):
            instants.append(int(np.argmax(base)))

    def least_time(self, budget_bytes: int) -> Relaxed | None:
        """The fastest fractional choice within the budget, None if there is none."""
        scale_s = max(float(np.abs(self.time_s).max(initial=0)), _SLIGHT)
        while True:
            rows = self._rows()
            room = (budget_bytes - self.base[np.array(self.instants)]) / self.unit
            result = linprog(
                self.time_s / scale_s,
                A_ub=vstack([self.limits, rows]),
                b_ub=np.concatenate([self.most, room]),
                bounds=(0.0, None),
                method="highs",
            )
            if result.x is None:
                return None
            if not self._extended(result.x, budget_bytes):
                break
        return self._relaxed(result.fun * scale_s, scale_s, result.ineqlin.marginals, rows)

    def least_peak(self) -> Relaxed | None:
        """The smallest peak of fractional choices, None if the solver finds none."""
        n = self.limits.shape[1]
        bounds = np.array([(0.0, 1.0)] * n + [(0.0, np.inf)])
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
            if result.x is None:
                return None
            peak = float(result.x[-1]) * self.unit
            if not self._extended(result.x[:n], peak * (1 + 1e-6)):
                break
        relaxed = self._relaxed(peak, 1.0, result.ineqlin.marginals, rows)
        prices = {at: price * self.unit for at, price in relaxed.prices.items()}
        return Relaxed(peak, prices, relaxed.reduced)

    def _rows(self) -> csr_array:
        at = np.array(self.instants, dtype=np.int64)
        return csr_array(np.array([d[at] for d in self.deltas], dtype=float).T / self.unit)

    def _extended(self, x: np.ndarray, most_bytes: float) -> bool:
        """Whether a solution is too high somewhere, which is then an instant of the program."""
        if len(self.instants) >= _ROUNDS * _WINDOWS:
            return False
        level = self.base + sum(x[j] * self.deltas[j] for j in np.nonzero(x)[0])
        fresh = binding(level, most_bytes, self.instants)
        self.instants.extend(fresh)
        return bool(fresh)

    def _relaxed(self, value: float, scale: float, duals: np.ndarray, rows: csr_array) -> Relaxed:
        count = len(self.most)
        cost = self.time_s if scale != 1.0 else 0 * self.time_s
        reduced = cost - scale * (self.limits.T @ duals[:count] + rows.T @ duals[count:])
        prices = {
            at: float(-dual) * scale / self.unit
            for at, dual in zip(self.instants, duals[count:], strict=True)
            if -dual > _SLIGHT
        }
        return Relaxed(value, prices, reduced)


def binding(levels: np.ndarray, most_bytes: float, known: Sequence[int]) -> list[int]:
    """The highest instants above what there may be that are not known yet, far apart."""
    window = max(1, len(levels) // _WINDOWS)
    found: list[int] = []
    for start in range(0, len(levels), window):
        at = start + int(np.argmax(levels[start : start + window]))
        if levels[at] > most_bytes and at not in known:
            found.append(at)
    return found
