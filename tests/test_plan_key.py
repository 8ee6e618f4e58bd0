"""A plan that was made before an optimizer's first step is that of the resumed run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, AdamW, Optimizer, RAdam

import actckpt
from actckpt.planning.plan_key import plan_key

MADE: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "ASGD": ASGD,
    "RAdam": RAdam,
    "SGD": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", MADE)
def test_fresh_optimizer_and_one_that_has_stepped(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = MADE[name](model.parameters())
    batch = torch.randn(2, 3)

    def key() -> str:
        return plan_key(actckpt.trace(model, batch, loss_fn=torch.mean, optimizer=optimizer))

    fresh = key()
    model(batch).mean().backward()
    optimizer.step()
    assert key() == fresh
