"""What a refused budget says it needs is made of the parts that it names."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest

import actckpt
from actckpt.data.graph import Graph
from actckpt.data.profile import Cost, Profile
from actckpt.units import GIGABYTES
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

SCRATCH_BYTES = 1_234_567


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation takes a microsecond and some scratch, as oneDNN's convolutions do."""

    def build(graph: Graph, **_: Any) -> Profile:
        return Profile(graph.device, tuple(Cost(1e-6, SCRATCH_BYTES) for _ in graph.signatures))

    monkeypatch.setattr("actckpt.planning.making.build_profile", build)


@pytest.mark.kind("a budget that nothing fits", peak="said")
@pytest.mark.parametrize("scope", ["step", "activations"])
@pytest.mark.parametrize("policy", ["auto", "calls", "full"])
def test_the_split_adds_up_to_what_is_asked_for(scratch: None, scope: str, policy: str) -> None:
    model = seeded(chain(6))()
    with pytest.raises(actckpt.BudgetError) as caught:
        actckpt.optimize(
            model, 1e-6, batch=rows(512), loss_fn=scalar_loss, scope=scope, policy=policy
        )
    error, text = caught.value, str(caught.value)
    needed = re.search(r"below the ([\d.]+) GB that", text)
    split = re.search(r"GB at its peak: (.*?); reached", text)
    assert needed is not None
    assert split is not None
    parts = dict(part.rsplit(" ", 1) for part in split[1].split(", "))
    assert sum(map(Decimal, parts.values())) == Decimal(needed[1])
    assert sum(error.split.values()) == error.smallest_bytes
    assert error.split["scratch inside kernels"] == SCRATCH_BYTES
    assert parts.keys() == error.split.keys()
    if scope == "activations":
        assert parts.keys() == {"activations", "scratch inside kernels", "margin"}


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ([1], ["0.000000001"]),
        ([0, 0], ["0.000", "0.000"]),
        ([600_000_000, 600_400_000, 600_400_000], ["0.600", "0.601", "0.600"]),
        ([400_000] * 5 + [1_000_000_000], ["0.001", "0.001", *["0.000"] * 3, "1.000"]),
        ([0, 5_000_000_000], ["0.000", "5.000"]),
    ],
)
def test_parts_are_rounded_so_that_they_add_up(parts: list[int], shown: list[str]) -> None:
    found = GIGABYTES.split(sum(parts), parts)
    assert found == shown
    assert sum(map(Decimal, found)) == Decimal(GIGABYTES.number(sum(parts)))
