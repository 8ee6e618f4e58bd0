"""A GPT and a training loop of one's own, within two thirds of the memory that it takes.

    python examples/own_gpt_loop.py

Shows: one call bounds the peak, and losses stay those of the untouched model to the last bit.
"""

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

import actckpt


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3 * self.heads, -1).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        x = x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))
        return x


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int = 4, vocabulary: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.blocks(self.tokens(ids))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(share: float | None, layers: int, width: int, steps: int) -> tuple[list[float], int]:
    """The losses and the measured peak, within ``share`` of the untouched one."""
    torch.manual_seed(0)
    model = GPT(layers, width)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(256, (8, 128))
    untouched = actckpt.measure(model, ids, optimizer=optimizer, steps=1)
    if share is not None:
        actckpt.optimize(model, share * untouched.peak_bytes / 1e9, batch=ids, optimizer=optimizer)
    losses = []
    for step in range(steps):  # as without actckpt
        loss = model(ids.roll(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    measured = actckpt.measure(model, ids, optimizer=optimizer, steps=1)
    if share is not None:
        print(f"{actckpt.report(model).save('runs/own_gpt_loop.html')}: a page to look at")
    return losses, measured.peak_bytes


def main(layers: int = 6, width: int = 128, steps: int = 5) -> None:
    Path("runs").mkdir(exist_ok=True)
    plain, whole_bytes = train(None, layers, width, steps)
    planned, peak_bytes = train(0.66, layers, width, steps)
    print(f"peak {peak_bytes / 1e6:.1f} MB of {whole_bytes / 1e6:.1f}")
    print(f"losses equal to the last bit: {plain == planned}")


if __name__ == "__main__":
    main()
