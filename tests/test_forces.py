"""A forward that differentiates itself: energies, and forces that are trained on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import actckpt
from tests.exact import differences

WIDTH, ROWS = 32, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        return out


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        positions = positions.detach().requires_grad_()
        x = self.embed(positions)
        for block in self.blocks:
            x = block(x)
        energy = self.head(x).sum()
        (force,) = torch.autograd.grad(energy, positions, create_graph=True)
        loss: torch.Tensor = (energy / ROWS).square() + force.square().mean()
        return loss


def trained(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for n in range(2):
        model(x).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[f"{n} {name}"] = p.grad.clone()
                with torch.no_grad():
                    p.sub_(p.grad, alpha=0.1)
                p.grad = None
    return found


@pytest.mark.kind("a forward that calls autograd.grad", bits=True, peak="within")
@pytest.mark.parametrize("policy", ["auto", "calls"])
def test_its_blocks_are_recomputed_in_both_passes(policy: str) -> None:
    torch.manual_seed(0)
    model, x = Forces(), torch.randn(ROWS, 3)
    expected = trained(copy.deepcopy(model), x)
    budget = int(0.95 * actckpt.measure(model, x, steps=1).peak_bytes)
    actckpt.optimize(model, budget / 1e9, batch=x, policy=policy)
    assert actckpt.report(model).plan.regions
    assert actckpt.measure(model, x, steps=1).peak_bytes <= budget
    assert not differences(expected, trained(model, x))
