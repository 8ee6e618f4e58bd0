"""A byte-level GPT in plain PyTorch: nothing in it knows of actckpt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    layers: int = 8
    width: int = 128
    heads: int = 4
    context: int = 256
    dropout: float = 0.1


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer of four times the width."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_1 = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)
        self.norm_2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What follows ``x``, both (batch, context, width)."""
        batch, context, width = x.shape
        heads = self.query_key_value(self.norm_1(x)).view(batch, context, 3 * self.heads, -1)
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, context, width)
        x = x + self.dropout(self.projection(attended))
        x = x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))
        return x


class GPT(nn.Module):
    """A decoder-only transformer over bytes whose embedding is also its output layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, context, 256) for ids (batch, context)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.tokens(ids) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def next_byte_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per byte.

    Args:
        logits: (batch, context, 256).
        target: (batch, context), the ids shifted by one.
    """
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())
