"""Drawn at random: chains and networks of blocks of every kind, under plans of every shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region, SavedOp
from actckpt.policies import POLICIES
from tests.exact import assert_exact, dear, region
from tests.models.blocks import WIDTH, Chain, Network, Residual, rows


class InPlace(nn.Module):
    """A product, an activation and a dropout in place, a view changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        y[:, ::2].mul_(0.5)
        y = nn.functional.leaky_relu(y, 0.1, inplace=True)
        return y.flatten().view_as(x) + x


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.linear(x)).tanh()
        return out


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).sin() * torch.rand_like(x)
        return nn.functional.dropout(y.exp(), 0.2) * torch.rand(())


class Twice(nn.Module):
    """Calls one layer twice, and hands its input through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(p=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(self.inner(x)).sigmoid()
        return out


class Frozen(Residual):
    def __init__(self) -> None:
        super().__init__(p=0.1)
        self.requires_grad_(False)


KINDS: tuple[Callable[[], nn.Module], ...] = (
    Residual, lambda: Residual(p=0.3), InPlace, Statistics, Noise, Twice, Frozen, nn.Tanh,
    nn.Identity, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()),
)  # fmt: skip
INNER = {2: ("linear",), 3: ("linear", "norm"), 4: ("linear",), 5: ("inner",), 9: ("0", "1")}


def examples(count: int) -> settings:
    """So many, the same ones each time; small enough to read.

    Shrinking would replay hundreds of training steps.
    """
    return settings(
        phases=[Phase.explicit, Phase.generate],
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def forests(
    draw: st.DrawFn, first: int, last: int, kinds: tuple[int, ...], depth: int
) -> list[Region]:
    """Disjoint regions over the blocks from ``first`` to ``last``, some with regions inside."""
    found: list[Region] = []
    at = first
    while at <= last:
        if draw(st.integers(0, 3)) == 0:
            at += 1
            continue
        end = draw(st.integers(at, last))
        inside: list[Region] = []
        if depth and draw(st.booleans()):
            if end > at:
                inside = draw(forests(at, end, kinds, depth - 1))
            elif kinds[at] in INNER:
                name = draw(st.sampled_from(INNER[kinds[at]]))
                inside = [region(f"blocks.{at}.{name}")]
        found.append(region(f"blocks.{at}", f"blocks.{end}", *inside))
        at = end + 1
    return found


def with_saved(graph: Graph, wanted: Region, chosen: frozenset[int]) -> Region:
    """``wanted`` with some of the operations saved in each of its innermost regions."""
    if wanted.regions:
        inner = tuple(with_saved(graph, r, chosen) for r in wanted.regions)
        return Region(wanted.first, wanted.last, inner)
    ids = graph.stage_ids
    first, last = graph.stages[ids[wanted.first]].first, graph.stages[ids[wanted.last]].last
    seen: Counter[tuple[int, str]] = Counter()
    saved = []
    for n, op in enumerate(graph.ops[first:last]):
        nth = seen[(op.stage, op.name)]
        seen[(op.stage, op.name)] += 1
        owner = graph.stages[op.stage]
        if n in chosen and owner.path:
            saved.append(SavedOp(owner.path, owner.call, op.name, nth))
    return Region(wanted.first, wanted.last, (), tuple(saved))


def test_a_region_around_a_region_inside_its_stage_is_not_pruned() -> None:
    """Found below: the inner region's arguments would be placeholders."""
    wanted = Plan("drawn", (region("", None, region("blocks.0", "blocks.1")),))

    def make() -> nn.Module:
        return Chain(InPlace(), Statistics(), Residual(), nn.Linear(WIDTH, WIDTH))

    assert_exact(make, rows, wanted, prune=True, must_replay=False)


@examples(40)
@given(st.data())
def test_random_chains_under_random_plans(data: st.DataObject) -> None:
    kinds = tuple(data.draw(st.lists(st.integers(0, len(KINDS) - 1), min_size=2, max_size=6)))
    trees = data.draw(forests(0, len(kinds) - 1, kinds, 3))
    if data.draw(st.booleans()):
        # children of the root's own region: descend and span in one
        trees = [region("", None, *trees)]
    chosen = data.draw(st.frozensets(st.integers(0, 25), max_size=8))
    prune = data.draw(st.booleans())

    def make() -> nn.Module:
        model = Chain(*(KINDS[k]() for k in kinds), nn.Linear(WIDTH, WIDTH))
        return model

    def wanted(graph: Graph) -> Plan:
        return Plan("drawn", tuple(with_saved(graph, r, chosen) for r in trees))

    assert_exact(make, rows, wanted, prune=prune, steps=2, must_replay=False)


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, ...]]]:
    """Kinds of blocks, and which results each reads: mostly the last one, or the one before."""
    kinds = draw(st.lists(st.integers(0, len(KINDS) - 1), min_size=2, max_size=7))
    reads = []
    for n in range(len(kinds)):
        near = st.integers(max(0, n - 2), n)
        reads.append(tuple(draw(st.lists(near, min_size=1, max_size=2, unique=True))))
    return kinds, reads


@pytest.mark.parametrize("policy", ["full", "sqrt", "log", "selective", "calls"])
@examples(8)
@given(network=networks())
# branches that read what comes before them, and not each other: half of them is no chain
@example(network=([0, 0, 0, 0], [(0,), (1,), (1,), (1,)]))
@example(network=([0] * 6, [(0,), (1,), (1,), (1,), (1,), (1,)]))
def test_random_networks_under_every_policy(
    policy: str, network: tuple[list[int], list[tuple[int, ...]]]
) -> None:
    kinds, reads = network

    def make() -> nn.Module:
        blocks = [*(KINDS[k]() for k in kinds), nn.Linear(WIDTH, WIDTH)]
        return Network(blocks, [*reads, (len(kinds),)])

    def wanted(graph: Graph) -> Plan:
        try:
            return POLICIES[policy](graph, dear(graph), 1 if policy == "calls" else None)
        except BudgetError as error:
            return error.smallest_plan or pytest.fail("no smallest plan")

    assert_exact(make, rows, wanted, steps=2, must_replay=False)
