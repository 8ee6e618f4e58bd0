"""A chain of equal residual blocks, called from a loop over a ModuleList."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + nn.functional.gelu(self.linear(self.norm(x)))
        return out


class MLP(nn.Module):
    """``depth`` equal blocks; no head, the last block's output is the model's."""

    def __init__(self, depth: int = 64, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x
