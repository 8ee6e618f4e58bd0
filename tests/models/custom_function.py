"""Blocks that go through a custom autograd.Function with saved tensors and a plain number."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ScaledSwish(torch.autograd.Function):
    """x * sigmoid(scale * x); saves x and the sigmoid, and the scale as a float on ``ctx``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        gate = torch.sigmoid(scale * x)
        ctx.save_for_backward(x, gate)
        ctx.scale = scale
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, gate = ctx.saved_tensors
        return grad * gate * (1 + ctx.scale * x * (1 - gate)), None


class Block(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = ScaledSwish.apply(  # type: ignore[no-untyped-call]
            self.rise(self.norm(x)), self.scale
        )
        out: torch.Tensor = x + self.fall(hidden)
        return out


class CustomFunctionModel(nn.Module):
    def __init__(self, depth: int = 6, width: int = 64, classes: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, 1.0 + 0.1 * i) for i in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out
