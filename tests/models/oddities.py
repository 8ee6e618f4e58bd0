"""Blocks that a planner may stumble over, each in its own way; any of them can follow any other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

WIDTH = 16
STEPS = 8


class Block(nn.Module):
    """Rows of `WIDTH` numbers, a multiple of `STEPS` of them, to as many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)


class Averaged(Block):
    """A moving average in a buffer, which is read as it is now."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).sin()
        self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y - self.average


class Branching(Block):
    """Branches on a mask, and divides by how many are in it."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.positions > 3
        y: torch.Tensor = self.linear(x)
        if kept.any():
            y = y * kept
        return y.exp().tanh() / int(kept.sum()) + x


class Counting(Block):
    """Divides by a counter, and normalizes with cumulative averages."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        out: torch.Tensor = (self.norm(self.linear(x)) / float(self.steps)).tanh() + x
        return out


class Remembering(Block):
    """Leaves its last activation behind in an attribute."""

    last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).tanh()
        self.last = y.detach()
        return y + x


class Drawing(Block):
    """Draws a permutation, samples of probabilities and rates, and two kinds of dropout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x[torch.randperm(x.shape[0])]).sin()
        y = nn.functional.dropout(y, 0.3) * torch.bernoulli(torch.full((WIDTH,), 0.7))
        return (
            y
            + nn.functional.alpha_dropout(x, 0.1, self.training)
            + torch.poisson(torch.ones(WIDTH))
        )


class Sorting(Block):
    """Operations of several results, one of them integers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, order = self.linear(x).sort(dim=1)
        out: torch.Tensor = values.cos() + x.gather(1, order).tanh()
        return out


class Windows(Block):
    """Changes windows of its activations in place, and splits what comes of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).clone()
        y[:, : WIDTH // 2].add_(y[:, WIDTH // 2 :].tanh())
        y.view(-1, 2, WIDTH // 2)[:, 1].mul_(2)
        y.t()[0].add_(1)
        left, right = y.sin().split(WIDTH // 2, 1)
        return torch.cat([left * right, right.exp()], 1).tanh() + x


class Scattering(Block):
    """Fills, clamps and adds in place what is read before and after."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y = y.masked_fill(y > 0, 0.1).clamp_(-1, 1)
        order = torch.arange(y.shape[0]).flip(0)
        return torch.zeros_like(y).index_add_(0, order, y).cumsum(1).tanh()


class Detached(Block):
    """Scales by what no gradient flows through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.linear(x).abs().mean(1, keepdim=True)
        out: torch.Tensor = (self.linear(x) / (scale + 1)).tanh() + x.detach() * 0.1
        return out


class Complex(Block):
    """Saves complex numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(self.linear(x).tanh()) * (1 + 0.5j)
        out: torch.Tensor = torch.fft.irfft(spectrum, n=WIDTH).sin() + x
        return out


class Precisions(Block):
    """Float64 inside, and bfloat16 by autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).double()
        y = (y.logsumexp(1, keepdim=True) - y).float().tanh()
        with torch.autocast("cpu", torch.bfloat16):
            z = self.linear(x).tanh()
        out: torch.Tensor = y + z.float() * x.sigmoid()
        return out


class Recurrent(Block):
    """A GRU over `STEPS` rows at a time, and attention with dropout over the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.three = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gru(x.view(-1, STEPS, WIDTH))[0].reshape(x.shape) + self.linear(x)
        heads = self.three(y).view(-1, STEPS, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        out: torch.Tensor = mixed.transpose(1, 2).reshape(x.shape) + x
        return out


class Pooled(Block):
    """A convolution, an activation in place, and maxima with their indices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(4, 4)
        self.last = nn.Linear(4 * (WIDTH // 2), WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.norm(self.conv(self.linear(x)[:, None])), inplace=True)
        out: torch.Tensor = self.last(nn.functional.max_pool1d(y, 2).flatten(1)) + x
        return out


ODDITIES: tuple[Callable[[], nn.Module], ...] = (
    Averaged, Branching, Counting, Remembering, Drawing, Sorting, Windows, Scattering, Detached,
    Complex, Precisions, Recurrent, Pooled,
)  # fmt: skip
