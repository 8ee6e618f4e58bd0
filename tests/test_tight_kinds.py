"""Little memory for chains of every kind: what blocks share, change in place, or draw at random."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import actckpt
from tests.models.blocks import Chain, Residual, rows
from tests.suite import seeded

WIDTH = 32
DEPTH = 6


class InPlace(nn.Module):
    """Linear layers, the activation written over what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.up(x), inplace=True)
        out: torch.Tensor = self.down(y).add_(x)
        return out


def shared() -> nn.Module:
    """Two blocks that hold the same linear layer, in turns."""
    first, second = Residual(WIDTH), Residual(WIDTH)
    second.linear = first.linear
    return Chain(*(first, second) * (DEPTH // 2))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "shared": shared,
    "in place": lambda: Chain(*(InPlace() for _ in range(DEPTH))),
    "drawn": lambda: Chain(*(Residual(WIDTH, 0.2) for _ in range(DEPTH))),
    "one block": lambda: Chain(Residual(WIDTH)),
}


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def smallest_gb(model: nn.Module, batch: torch.Tensor, policy: str) -> float:
    """The least that a policy accepts: the error says so."""
    with pytest.raises(actckpt.BudgetError) as error:
        actckpt.optimize(model, 1e-9, batch=batch, loss_fn=loss_of, policy=policy,
                         scope="activations")  # fmt: skip
    assert error.value.smallest_bytes is not None
    return error.value.smallest_bytes / 1e9


def stepped(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)
    loss = loss_of(model(batch))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), torch.get_rng_state(), *grads]


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_memory_of_a_chain_costs_no_bit(kind: str) -> None:
    batch = rows(64, WIDTH)
    untouched = seeded(KINDS[kind])()
    model = copy.deepcopy(untouched)
    budget_gb = smallest_gb(model, batch, "auto")
    actckpt.optimize(model, budget_gb, batch=batch, loss_fn=loss_of, scope="activations")
    measured = actckpt.measure(model, batch, loss_fn=loss_of, steps=1)
    assert measured.added_bytes <= 1e9 * budget_gb
    for model_grad, grad in zip(stepped(model, batch), stepped(untouched, batch), strict=True):
        assert torch.equal(model_grad, grad)


class Long(nn.Module):
    """Several layers in one block: as a whole it needs more than a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.layers:
            x = torch.tanh(nn.functional.linear(x, weight))
        return x


def test_below_the_floor_of_blocks_auto_fits_and_rotor_says_what_it_needs() -> None:
    batch = rows(64, WIDTH)
    model = seeded(lambda: Chain(*(Long() for _ in range(4))))()
    by_blocks, by_operations = (smallest_gb(model, batch, p) for p in ("rotor", "auto"))
    assert by_operations < 0.9 * by_blocks
    between = (by_blocks + by_operations) / 2
    with pytest.raises(actckpt.BudgetError, match="smallest plan of policy 'rotor'"):
        actckpt.optimize(model, between, batch=batch, loss_fn=loss_of, policy="rotor",
                         scope="activations")  # fmt: skip
    actckpt.optimize(model, between, batch=batch, loss_fn=loss_of, scope="activations", effort=0)
    measured = actckpt.measure(model, batch, loss_fn=loss_of, steps=1)
    assert measured.added_bytes <= 1e9 * between
