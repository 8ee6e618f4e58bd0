"""Levels say what the array said."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actckpt.policies.solver.run_lengths import Levels

ARRAYS = st.lists(st.sampled_from([0, 0, 0, 5, -(10**12), 2**62]), min_size=1, max_size=40)


@given(ARRAYS, st.data())
def test_levels_are_those_of_the_array(numbers: list[int], data: st.DataObject) -> None:
    array = np.array(numbers, dtype=np.int64)
    levels = Levels.of(array)
    assert (levels.whole() == array).all()
    assert levels.whole().dtype == array.dtype
    at = np.array(data.draw(st.lists(st.integers(0, len(array) - 1))), dtype=np.int64)
    assert (levels.at(at) == array[at]).all()


def test_runs_of_equal_numbers_are_one() -> None:
    levels = Levels.of(np.repeat([0, 7, 0], [1000, 3, 2000]))
    assert levels.starts.tolist() == [0, 1000, 1003]
    assert levels.values.tolist() == [0, 7, 0]


def test_levels_of_no_operation() -> None:
    assert len(Levels.of(np.zeros(0, dtype=np.int64)).whole()) == 0
