"""How long a search may go on: work counted from the sizes of what it solves, not a clock."""

from __future__ import annotations

import math

from scipy.sparse import csr_array

from actckpt.errors import ArgumentError

DEFAULT_EFFORT = 1.0
MOST_EFFORT = 20.0
# counted seconds after which a search of effort 1 begins nothing more
_SEARCH_S = 6.0

# as measured on one core of 2026: seconds for each number in an integer program before its first
# node, the more the more rows, and for each cell of its matrix in every node
_ROOT_S = 2e-4
_ROOT_ROWS = 500
_NODE_S = 1.2e-7
_NODES_AT_MOST = 1e9
# programs of one segment, which are nearly integral: for each cell, and the more the more rows
_STAGED_S = 1.5e-7
_STAGED_ROWS = 500
# of that, what their linear relaxation takes
_RELAXED = 1 / 6
# linear programs: for each row and column in every step of the simplex method
_STEP_S = 2e-8
# pricing something once, and for each operation of the step
_PRICED_S = (2e-4, 1e-7)


class Work:
    """The work of one search, in seconds as a core of 2026 would take, and how much is allowed.

    What is counted depends on the programs alone, so a plan is the same on every machine, busy or
    not. What has begun is finished: programs are bounded by size before they are solved.
    """

    def __init__(self, allowed_s: float = math.inf) -> None:
        self.allowed_s = allowed_s
        self.spent_s = 0.0

    @classmethod
    def of(cls, effort: float) -> Work:
        """What a search of this effort may do.

        Raises:
            ArgumentError: no such effort.
        """
        return cls(_SEARCH_S * checked_effort(effort))

    @property
    def is_left(self) -> bool:
        """Whether something more may begin."""
        return self.spent_s < self.allowed_s

    def leave(self, seconds: float) -> None:
        """No more than this may be spent from now on."""
        self.allowed_s = min(self.allowed_s, self.spent_s + seconds)

    def nodes_left(self, matrix: csr_array) -> int:
        """Nodes of an integer program over this matrix that what is left allows, at least one."""
        left_s = self.allowed_s - self.spent_s - _root_s(matrix)
        return int(min(max(1.0, left_s / (_NODE_S * _cells(matrix))), _NODES_AT_MOST))

    def allows(self, matrix: csr_array) -> bool:
        """Whether what is left is enough for an integer program over this matrix."""
        return self.spent_s + _root_s(matrix) <= self.allowed_s

    def spend_integer(self, matrix: csr_array, nodes: int) -> None:
        """An integer program that was solved in so many nodes."""
        self.spent_s += _root_s(matrix) + _NODE_S * _cells(matrix) * nodes

    def spend_staged(self, rows: int, columns: int, *, whole: bool = True) -> None:
        """A program of one segment, of one node; or else its linear relaxation."""
        share = 1.0 if whole else _RELAXED
        self.spent_s += share * _STAGED_S * rows * columns * (1 + rows / _STAGED_ROWS)

    def spend_linear(self, rows: int, columns: int, steps: int) -> None:
        """A linear program that took so many steps of the simplex method."""
        self.spent_s += _STEP_S * (rows + columns) * steps

    def spend_priced(self, operations: int) -> None:
        """Something was priced in a step of so many operations."""
        once_s, operation_s = _PRICED_S
        self.spent_s += once_s + operation_s * operations


def _root_s(matrix: csr_array) -> float:
    return float(_ROOT_S * matrix.nnz * matrix.shape[0] / _ROOT_ROWS)


def _cells(matrix: csr_array) -> int:
    return int(matrix.shape[0] * matrix.shape[1])


def checked_effort(effort: float) -> float:
    """The effort, if it is one.

    Raises:
        ArgumentError: it is no number from 0 to `MOST_EFFORT`.
    """
    is_number = isinstance(effort, int | float) and not isinstance(effort, bool)
    if not is_number or not 0 <= effort <= MOST_EFFORT:
        raise ArgumentError(
            f"effort must be a number from 0 (the first plan that fits) to {MOST_EFFORT:g}; "
            f"found {effort!r}. {DEFAULT_EFFORT:g} is the default: seconds, whatever the budget"
        )
    return float(effort)
