"""A run most of whose weights nobody trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import actckpt
from actckpt.checkpoint.names import FROZEN


class Adapted(nn.Module):
    """Two frozen layers of one content, a trained one on top, and a large mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 40).requires_grad_(False)
        self.second = nn.Linear(40, 40).requires_grad_(False)
        self.second.load_state_dict(self.first.state_dict())
        self.head = nn.Linear(40, 3)
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.ones(40, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(self.second(self.first(x) * self.mask[0])).square().mean()
        return loss


def objects(seed: int = 0) -> dict[str, Any]:
    """Arguments of a Checkpointer."""
    torch.manual_seed(seed)
    model = Adapted()
    return {"model": model, "optimizer": torch.optim.AdamW(model.head.parameters(), lr=0.01)}


def advance(run: actckpt.Checkpointer, made: dict[str, Any], steps: int = 1) -> None:
    """Some optimizer steps."""
    for _ in range(steps):
        made["optimizer"].zero_grad()
        made["model"](torch.randn(5, 40)).backward()
        made["optimizer"].step()
        run.step({"loss": 1.0})


def bases(directory: Path) -> list[Path]:
    """The files of frozen tensors."""
    return sorted((directory / FROZEN).glob("*"))


def damage(path: Path) -> None:
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
