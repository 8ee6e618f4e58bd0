"""What generators' states take while a forward runs: no more than was planned for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actckpt
from tests.suite import seeded


class Adapted(nn.Module):
    """A frozen layer beside one of low rank that is trained, behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(128, 8).requires_grad_(False)
        self.down = nn.Linear(128, 4, bias=False)
        self.up = nn.Linear(4, 8, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.up(self.down(self.drop(x)))
        return out


class Net(nn.Module):
    """Its peak is at the end of the forward, where every region has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(8, 128) for _ in range(4))
        self.narrow = nn.ModuleList(Adapted() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(nn.functional.gelu(wide(x)))
        return x


@pytest.mark.kind("regions that draw", peak="within")
def test_regions_keep_one_state_each_and_nothing_beside_it() -> None:
    model, batch = seeded(Net)(), torch.randn(2, 96, 8)

    def loss_fn(output: torch.Tensor) -> torch.Tensor:
        return output.square().mean()

    untouched = actckpt.measure(model, batch, loss_fn=loss_fn, steps=1)
    budget_bytes = 0.85 * untouched.peak_bytes
    actckpt.optimize(model, budget_bytes / 1e9, batch=batch, loss_fn=loss_fn, policy="calls")
    report = actckpt.report(model)
    assert len(report.plan.regions) > 1
    measured = actckpt.measure(model, batch, loss_fn=loss_fn, steps=1)
    assert measured.peak_bytes <= budget_bytes
    assert report.planned.predicted.peak_bytes == measured.peak_bytes
