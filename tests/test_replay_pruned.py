"""Replays of regions that leave operations out: what they may not leave out, and may not reuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from tests.exact import MakePlan, assert_exact, plan, region, saving
from tests.models.blocks import WIDTH, Chain, rows
from tests.suite import seeded


class Sampled(nn.Module):
    """What it draws first is not needed by backward, but how much of the stream that takes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.kind == "poisson":  # as many draws as the rates ask for
            y = y + torch.poisson(torch.full((WIDTH,), 30.0))
        elif self.kind == "bernoulli":  # which refuses what is no probability
            y = y + torch.bernoulli(torch.full((WIDTH,), 2.0) / 4)
        else:
            y = y + nn.functional.dropout(x.exp(), 0.5)
        out: torch.Tensor = y * torch.rand_like(y)
        return out


def keeping(operation: str) -> MakePlan:
    """Both blocks recomputed but for the results of one kind of operation."""

    def wanted(graph: Graph) -> Plan:
        blocks = ("blocks.0", "blocks.1")
        return plan(*(region(block, saved=saving(graph, block, operation)) for block in blocks))

    return wanted


@pytest.mark.parametrize("kind", ["poisson", "bernoulli", "dropout"])
def test_random_operations_that_look_at_their_arguments(kind: str) -> None:
    make = seeded(lambda: Chain(Sampled(kind), Sampled(kind)))
    assert_exact(make, rows, keeping("aten.add"), prune=True, check=False)


class ReadThenWritten(nn.Module):
    """A result is read, changed in place, and saved only then."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) + 0.5
        before = y.exp()
        y.mul_(0.5)
        out: torch.Tensor = y * y.detach() + before
        return out


@pytest.mark.parametrize("kept", ["aten.mul_", "aten.add"])
def test_a_kept_result_that_changed_after_it_was_read(kept: str) -> None:
    """The replay ends before the change, so the change is none of its operations."""

    make = seeded(lambda: Chain(ReadThenWritten(), ReadThenWritten()))
    assert_exact(make, rows, keeping(kept), prune=True, must_replay=False, check=False)
