"""Rotor's program against every schedule of drawn chains, and what it must not be."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from actckpt.policies.solver.chain import Chain
from actckpt.policies.solver.chain_program import ChainProgram
from tests.chains import chains, run_through, schedules

# more than any drawn chain needs
MOST_BYTES = 40


def solved(chain: Chain) -> ChainProgram:
    """Bytes as units, and every split point: nothing is rounded, nothing left out."""
    return ChainProgram(chain, MOST_BYTES, MOST_BYTES, splits=None)


def best_s(chain: Chain, budget_bytes: int) -> float:
    """Of all schedules that fit."""
    found = (run_through(chain, schedule) for schedule in schedules(chain))
    return min((s for peak, s in found if peak <= budget_bytes), default=math.inf)


@settings(max_examples=100, deadline=None)
@given(chains(), st.integers(0, MOST_BYTES))
def test_it_finds_the_optimum(chain: Chain, budget_bytes: int) -> None:
    assert solved(chain).extra_s(budget_bytes) == best_s(chain, budget_bytes)


@settings(max_examples=60, deadline=None)
@given(chains(6), st.integers(0, MOST_BYTES))
def test_the_schedule_is_what_the_tables_say(chain: Chain, budget_bytes: int) -> None:
    program = solved(chain)
    schedule = program.schedule(budget_bytes)
    if schedule is None:
        assert program.extra_s(budget_bytes) == math.inf
        assert program.least_bytes is None or program.least_bytes > budget_bytes
        return
    peak_bytes, extra_s = run_through(chain, schedule)
    assert peak_bytes <= budget_bytes
    assert extra_s == program.extra_s(budget_bytes)


@settings(max_examples=20, deadline=None)
@given(chains(6), st.integers(2, 12))
def test_coarse_units_and_few_splits_only_cost(chain: Chain, units: int) -> None:
    coarse = ChainProgram(chain, MOST_BYTES, units, splits=2)
    exact = solved(chain)
    for budget_bytes in range(0, MOST_BYTES + 1, 8):
        assert coarse.extra_s(budget_bytes) >= exact.extra_s(budget_bytes)
        schedule = coarse.schedule(budget_bytes)
        assert schedule is None or run_through(chain, schedule)[0] <= budget_bytes


class _OneTooMany(ChainProgram):
    """Holds a unit less than there is to hold."""

    def _units(self, size: int | np.ndarray) -> np.ndarray:
        found: np.ndarray = np.maximum(super()._units(size) - 1, 0)
        return found


class _OwnPeakForgotten(ChainProgram):
    """Takes backward over what is kept to need nothing."""

    def __init__(self, chain: Chain, most_bytes: int, units: int, splits: int | None) -> None:
        nothing = tuple((0,) * len(row) for row in chain.peaks_bytes)
        super().__init__(dataclasses.replace(chain, peaks_bytes=nothing), most_bytes, units, splits)


class _NestedCountedOnce(ChainProgram):
    """Takes what runs again inside what runs again to be free."""

    def _spans(self, more: int) -> np.ndarray:
        true_s, self._replay_s = self._replay_s, _nothing  # type: ignore[method-assign]
        found = super()._spans(more)
        self._replay_s = true_s  # type: ignore[method-assign]
        return found


class _RunInNoRoom(ChainProgram):
    """Takes a forward in which nothing is kept to need nothing."""

    def _forward_peaks(self) -> np.ndarray:
        return np.zeros((len(self.chain), len(self.chain)), dtype=np.int64)


def _nothing(first: int | np.ndarray, last: int | np.ndarray) -> np.ndarray:
    return np.zeros(np.shape(last), dtype=np.float32)


@pytest.mark.parametrize(
    "broken", [_OneTooMany, _OwnPeakForgotten, _NestedCountedOnce, _RunInNoRoom]
)
def test_every_schedule_catches_a_broken_program(broken: type[ChainProgram]) -> None:
    def is_caught(drawn: tuple[Chain, int]) -> bool:
        chain, budget_bytes = drawn
        program = broken(chain, MOST_BYTES, MOST_BYTES, splits=None)
        return program.extra_s(budget_bytes) != best_s(chain, budget_bytes)

    drawn = st.tuples(chains(3), st.integers(0, MOST_BYTES))
    without_shrinking = settings(max_examples=4000, deadline=None, phases=[Phase.generate])
    # seeded: one of them shows in one of some thousand chains
    find(drawn, is_caught, settings=without_shrinking, random=Random(3))
