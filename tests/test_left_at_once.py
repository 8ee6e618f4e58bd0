"""A forward that is never the traced one: bounded or refused, not planned for in vain forever."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import actckpt
from tests.budgets import Step, floor_bytes, step_peak
from tests.exact import scalar_loss


class Otherwise(nn.Module):
    """One call that nothing inside of it divides, and that runs otherwise on fakes."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(1)) / 6
        self.weights = nn.ParameterList(weights.unbind())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.weights:
            x = torch.tanh(x @ w)
            x = torch.mul(x, 1.0) if isinstance(x, FakeTensor) else torch.add(x, 0.0)
        return x


def take(step: Step, model: nn.Module, count: int) -> None:
    for _ in range(count):
        model.zero_grad()
        step(model)


@pytest.mark.kind("a forward that is never the traced one", peak="said")
def test_plans_that_are_left_at_once_are_not_made_forever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(2))
    batch = (x,)

    def step(model: nn.Module) -> torch.Tensor:
        loss = scalar_loss(model(x))
        loss.backward()
        return loss

    model = Otherwise()
    whole, _ = step_peak(Otherwise(), step, batch)
    floor = floor_bytes(model, batch)
    actckpt.optimize(model, (floor + 0.6 * (whole - floor)) / 1e9, loss_fn=scalar_loss)
    with (
        caplog.at_level(logging.WARNING, "actckpt"),
        pytest.raises(actckpt.BudgetError, match="calls") as caught,
    ):
        take(step, model, 4)
    assert any("first step" in note for note in caught.value.__notes__)
    assert sum("is not the one that was planned for" in r.message for r in caplog.records) == 2
