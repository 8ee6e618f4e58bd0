"""One encoder called twice in a step; the loss pulls the two views of each example together."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.mlp import Block


class Encoder(nn.Module):
    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.drop(block(x))
        return x


class Siamese(nn.Module):
    def __init__(self, inputs: int = 48, width: int = 64, depth: int = 8) -> None:
        super().__init__()
        self.encoder = Encoder(inputs, width, depth)
        self.project = nn.Linear(width, 16)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        a = nn.functional.normalize(self.project(self.encoder(left)), dim=-1)
        b = nn.functional.normalize(self.project(self.encoder(right)), dim=-1)
        return (a - b).square().sum(-1).mean() + 0.1 * (a.T @ b / len(a)).square().mean()
