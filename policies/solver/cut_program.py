"""Keeping results or running operations again as a linear program with whole solutions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

# coefficients by column, and what their sum is at least
Row = tuple[list[tuple[int, float]], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """Numbers of the results that are kept, their bytes, the seconds of what runs again."""

    kept: tuple[int, ...]
    bytes: int
    time_s: float


class CutProgram:
    """Columns: keep each result, then run each operation again. A minimum cut where rows allow.

    Args:
        bytes: of each result.
        time_s: of each operation.
        most: 0 for each column that may not be chosen, else 1.
        rows: totally unimodular with the bounds, or solutions may be no whole numbers.
    """

    def __init__(
        self,
        bytes: NDArray[np.float64],
        time_s: NDArray[np.float64],
        most: Iterable[bool],
        rows: Iterable[Row],
    ) -> None:
        rows = tuple(rows)
        limits = np.fromiter(most, dtype=float)
        self._bytes = bytes
        self._time_s = time_s
        self._bounds = np.stack([np.zeros_like(limits), limits], axis=1)
        self._least = np.array([least for _, least in rows])
        self._matrix = csr_array(
            (
                [value for row, _ in rows for _, value in row],
                [column for row, _ in rows for column, _ in row],
                np.cumsum([0, *(len(row) for row, _ in rows)]),
            ),
            shape=(len(rows), len(limits)),
        )

    def best(self, price: float) -> Choice | None:
        """The least sum of seconds and of ``price`` seconds per kept byte; None if none is found.

        Of equal choices the one that keeps less.
        """
        cost = np.concatenate([self._bytes * price + 1e-15 * self._bytes, self._time_s])
        unit = float(cost.max()) or 1.0
        result = linprog(
            cost / unit,
            A_ub=-self._matrix,
            b_ub=-self._least,
            bounds=self._bounds,
            method="highs",
        )
        if result.x is None:
            return None
        kept, again = np.split(result.x > 0.5, [len(self._bytes)])
        return Choice(
            tuple(int(j) for j in np.flatnonzero(kept)),
            int(self._bytes[kept].sum()),
            float(self._time_s[again].sum()),
        )
