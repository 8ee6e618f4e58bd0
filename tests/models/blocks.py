"""Small building blocks for the region engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

WIDTH = 8


class Residual(nn.Module):
    """Norm, linear, GELU, dropout, and the input added."""

    def __init__(self, width: int = WIDTH, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.drop(nn.functional.gelu(self.linear(self.norm(x))))
        return out


class Chain(nn.Module):
    """Blocks called one after another from a loop over a ModuleList."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Network(nn.Module):
    """Blocks that each read what some earlier results add up to; the last results go out.

    Args:
        reads: for each block, of which results (0 is the input); one alone is passed as it is.
    """

    def __init__(self, blocks: Sequence[nn.Module], reads: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reads = tuple(reads)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = [x]
        for block, reads in zip(self.blocks, self.reads, strict=True):
            first, *others = (results[i] for i in reads)
            results.append(block(sum(others, start=first) if others else first))
        return results[-3:]


def chain(depth: int = 4, p: float = 0.0) -> Callable[[], nn.Module]:
    """A maker of chains of equal residual blocks."""
    return lambda: Chain(*(Residual(p=p) for _ in range(depth)))


def rows(count: int = 5, width: int = WIDTH, requires_grad: bool = False) -> torch.Tensor:
    """A batch of random rows, the same each time."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=g).requires_grad_(requires_grad)
