"""The walk that looks for generators, for what a model's code leaves behind, and in optimizers."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from actckpt.object_walk import cells, names_in, slots, walk


def parts(x: Any) -> list[Any]:
    return x if isinstance(x, list) else []


def test_each_once_and_where_they_hold_each_other() -> None:
    inner: list[Any] = ["c"]
    outer: list[Any] = ["a", inner, inner, ["d", inner]]
    inner.append(outer)
    assert list(walk([outer], parts)) == [outer, outer[3], inner, "c", "d", "a"]
    near = walk([outer], parts, nearest_first=True)
    assert list(near) == [outer, "a", inner, outer[3], "c", "d"]
    assert list(walk([outer], parts, seen=[inner])) == [outer, outer[3], "d", "a"]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_it_ends_after_so_many(most: int) -> None:
    assert len(list(walk([[1, 2, 3, 4]], parts, most=most))) == most
    assert len(list(walk([[1, 2, 3, 4]], parts, most=most, seen=["x"]))) == most


def test_no_id_is_taken_for_that_of_a_gone_object() -> None:
    def fresh(depth: int) -> list[Any]:
        return [[depth + 1]] if depth < 200 else []

    found = walk([[0]], lambda x: fresh(x[0]))  # nobody else holds what it made
    assert len([None for _ in found]) == 201


def test_by_which_way_it_was_found() -> None:
    shared = ["x"]
    found = walk(
        [("a", shared), ("b", shared)],
        lambda pair: [(f"{pair[0]}[{n}]", x) for n, x in enumerate(parts(pair[1]))],
        of=lambda pair: pair[1],
        nearest_first=True,
    )
    assert list(found) == [("a", shared), ("a[0]", "x")]


class Base:
    __slots__ = ("__weakref__", "first")


class Derived(Base):
    __slots__ = "second"


def test_slots_of_all_bases() -> None:
    assert list(slots(Derived)) == ["second", "first"]


def test_what_a_function_closes_over_and_names() -> None:
    bound = 1

    def function() -> Callable[[], Any]:
        def inner() -> Any:
            return len([bound, unbound])

        return inner

    assert isinstance(function, FunctionType)
    assert [(name, value) for name, _, value in cells(function)] == [("bound", 1)]
    assert names_in(function.__code__) == ("len",)
    unbound = 2
    assert [name for name, _, _ in cells(function)] == ["bound", "unbound"]
