"""What the integer program sees of several choices together against the price of their plan."""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import actckpt
from actckpt.policies.solver import packing as packings
from actckpt.policies.solver.burst_choices import burst_choices
from actckpt.policies.solver.packing import Choice, Packing
from actckpt.policies.solver.shared_holds import Hold, joined
from tests.predictions import prepared

# a residual stream, dropout, results of all earlier layers, skips, two chains, routing
MODELS = ("gpt2", "bert", "densenet", "unet", "t5", "mixtral")


@cache
def packing_of(name: str) -> Packing:
    p = prepared(name)
    return Packing(p.pricer, burst_choices(p.profile, p.pricer))


def drawn(packing: Packing, rng: random.Random) -> list[Choice]:
    """Choices at random, none of which takes what another does."""
    order = list(packing.choices)
    rng.shuffle(order)
    taken: set[int] = set()
    found = []
    for choice in order:
        if not taken & choice.takes:
            taken |= choice.takes
            found.append(choice)
    return sorted(found, key=lambda c: min(c.takes))


@pytest.mark.parametrize("name", MODELS)
def test_until_backward_begins_the_program_sees_the_bytes_of_the_price(name: str) -> None:
    packing = packing_of(name)
    end = packing.pricer.graph.forward_end
    rng = random.Random(0)
    lowered = 0
    for _ in range(12):
        picked = drawn(packing, rng)
        priced = packing.estimate(picked).timeline
        seen = packing.levels(picked)
        assert (seen[:end] == priced[:end]).all()
        lowered += int(priced[end - 1] < packing.base[end - 1])
    assert lowered


def test_what_the_layers_of_densenet_read_is_shared() -> None:
    packing = packing_of("densenet")
    most_readers = max(len(readers) for readers in packing.held.values())
    assert most_readers > 3
    # charged to each reader, the sum is far above
    picked = drawn(packing, random.Random(1))
    levels = packing.levels(picked)
    each = levels.copy()
    for hold in joined([c.holds for c in picked], frozenset(s for c in picked for s in c.takes)):
        if not hold.saved:
            hold.added_to(each, -1)
    for choice in picked:
        for hold in choice.holds:
            if not hold.saved:
                hold.added_to(each)
    end = packing.pricer.graph.forward_end
    assert each[end - 1] > 1.05 * levels[end - 1]


def test_the_last_reader_decides_how_long_a_result_is_held() -> None:
    short, long = Hold(3, 8, 10, 20, saved=False), Hold(3, 8, 10, 30, saved=False)
    saved = Hold(5, 4, 10, 25, saved=True)
    found = joined([(short, saved), (long,)], dropped=())
    assert found == {long: (0, 1)}  # nobody drops what is saved: it costs nothing
    assert joined([(short, saved)], dropped={5}) == {short: (0,), saved: (0,)}
    levels = np.zeros(40, dtype=np.int64)
    long.added_to(levels)
    assert (levels[10:30] == 8).all()
    assert levels.sum() == 160


@pytest.mark.parametrize("name", ["densenet", "unet"])
def test_where_results_are_shared_a_larger_budget_is_no_slower(name: str) -> None:
    p = prepared(name)
    whole = p.pricer.estimate(actckpt.Plan("none"))
    last = 0.0
    for share in (0.65, 0.75, 0.85, 0.95):
        budget = int(share * whole.peak_bytes)
        price = p.pricer.price(actckpt.POLICIES["optimal"](p.graph, p.profile, budget))
        assert price.peak_bytes <= budget
        assert last == 0 or price.time_s <= last * 1.002
        last = price.time_s


@pytest.mark.parametrize(("status", "nodes"), [(0, 1), (0, 2), (1, 1)])
def test_among_more_columns_only_if_few_were_easy(
    status: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = packing_of("densenet")
    packing = Packing(known.pricer, known.choices)
    assert len(packing.choices) > 20
    relaxed = packing.relaxation().least_peak()
    assert relaxed is not None
    budget_bytes = int((relaxed.value + packing.base.max()) / 2)
    monkeypatch.setattr(packings, "_COLUMNS", (10, 20, 500))
    monkeypatch.setattr(packings, "_FEWEST", 10)
    asked: list[int] = []

    def solved(cost: np.ndarray, **_: Any) -> SimpleNamespace:
        asked.append(len(cost) - len(packing.held))
        return SimpleNamespace(status=status, x=None, mip_node_count=nodes)

    monkeypatch.setattr(packings, "milp", solved)
    assert packing.fastest(budget_bytes) is None
    assert asked == (
        [10, 20, min(500, len(packing.choices))] if (status, nodes) == (0, 1) else [10]
    )
