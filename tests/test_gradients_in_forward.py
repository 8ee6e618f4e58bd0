"""Losses and modules whose autograd.Function makes its gradient in its forward, and keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import actckpt
from tests.exact import differences

WIDTH, CLASSES, ROWS = 32, 10, 256

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_autograd(
    loss: Loss, h: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        value = loss(h, w)
        a, b = torch.autograd.grad(value, (h, w))
    return value.detach(), a, b


def by_torch_func(
    loss: Loss, h: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (a, b), value = torch.func.grad_and_value(loss, argnums=(0, 1))(h, w)
    return value, a, b


def by_chunks(
    loss: Loss, h: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A vector-Jacobian product of one half after the other."""
    value, b = torch.zeros(()), torch.zeros_like(w)
    parts = []
    for part in h.chunk(2):
        found, pull = torch.func.vjp(loss, part, w)  # type: ignore[misc]
        a, more = pull(torch.ones(()))
        value, b = value + found, b + more
        parts.append(a)
    return value, torch.cat(parts), b


WAYS = [by_autograd, by_torch_func, by_chunks]
ways = pytest.mark.parametrize("way", WAYS, ids=[w.__name__ for w in WAYS])


def function(way: Any) -> Any:
    class MakesItsGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
                return cross_entropy(h @ w.T, t[: len(h)])

            value, a, b = way(loss, h, w)
            ctx.save_for_backward(a, b)
            found: torch.Tensor = value
            return found

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            a, b = ctx.saved_tensors
            return a * g, b * g, None

    return MakesItsGradient


class Head(nn.Module):
    def __init__(self, way: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH) * 0.1)
        self.function = function(way)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.function.apply(x, self.weight, t)
        return loss


class Encoder(nn.Module):
    """Blocks, and the loss in a module of its own or in the model's own forward."""

    def __init__(self, way: Any, inside: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
                nn.Dropout(0.1),
            )
            for _ in range(4)
        )
        self.head = Head(way)
        self.inside = inside

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        if self.inside:
            loss: torch.Tensor = self.head(x, t)
        else:
            loss = self.head.function.apply(x, self.head.weight, t)
        return loss


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=g), torch.randint(0, CLASSES, (ROWS,), generator=g)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    for step in range(3):
        loss = model(*batch())
        loss.backward()
        found[f"{step} loss"] = loss.detach().clone()
        for name, p in model.named_parameters():
            assert p.grad is not None
            found[f"{step} {name}"] = p.grad.clone()
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
            p.grad = None
    return found | {"random state": torch.get_rng_state()}


@pytest.mark.kind("a loss that makes its gradient in forward", bits=True, peak="within")
@ways
@pytest.mark.parametrize(("inside", "policy"), [(True, "auto"), (False, "auto"), (False, "calls")])
def test_all_but_the_function_is_recomputed(way: Any, inside: bool, policy: str) -> None:
    torch.manual_seed(0)
    model = Encoder(way, inside)
    expected = trained(copy.deepcopy(model))
    budget = int(0.6 * actckpt.measure(model, batch(), steps=1).peak_bytes)
    actckpt.optimize(model, budget / 1e9, batch=batch(), policy=policy)
    assert actckpt.measure(model, batch(), steps=1).peak_bytes <= budget
    assert not differences(expected, trained(model))


def test_a_module_that_does_so_is_left_out_with_a_reason() -> None:
    torch.manual_seed(0)
    for way, reason in ((by_autograd, "runs autograd"), (by_torch_func, "torch.func transform")):
        model = actckpt.optimize(Encoder(way, True), None, batch=batch(), policy="full")
        report = actckpt.report(model)
        assert any("head" in note and reason in note for note in report.notes)
        assert {r.first[0] for r in report.plan.regions} == {f"blocks.{n}" for n in range(4)}


def test_planning_leaves_the_hooks_of_transforms_as_they_were() -> None:
    before = torch.autograd.graph.disable_saved_tensors_hooks
    torch.manual_seed(0)
    actckpt.optimize(Encoder(by_torch_func, True), None, batch=batch(), policy="full")
    assert torch.autograd.graph.disable_saved_tensors_hooks is before
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
