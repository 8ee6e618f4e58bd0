"""A run of a few kilobytes, for tests of what is around it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import actckpt


class Small(nn.Module):
    """Two layers and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.norm(self.first(x)).square().mean()
        return loss


def objects(width: int = 3, seed: int = 0) -> dict[str, Any]:
    """Arguments of a Checkpointer."""
    torch.manual_seed(seed)
    model = Small(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {"model": model, "optimizer": optimizer}


def advance(run: actckpt.Checkpointer, made: dict[str, Any], steps: int, **metrics: Any) -> None:
    """Some optimizer steps."""
    for _ in range(steps):
        made["optimizer"].zero_grad()
        made["model"](torch.randn(5, 2)).backward()
        made["optimizer"].step()
        run.step(metrics)


def state(made: dict[str, Any]) -> dict[str, Any]:
    """A copy of the objects' states."""
    return {name: copy.deepcopy(item.state_dict()) for name, item in made.items()}


def names(run: actckpt.Checkpointer) -> list[str]:
    """Of the checkpoints, newest first."""
    return [c.path.name for c in run.list()]
