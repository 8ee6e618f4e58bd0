"""Gradients that have a graph themselves: what it saves of recomputed tensors is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from actckpt.tracing.call import Call
from tests.exact import assert_exact, enforce, plan, scalar_loss, watched
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded
from tests.test_replay_memory import Live, no_collection, wide
from tests.test_retained_graphs import PLANS, Normed, UsesTwice, plans, some


class Attends(nn.Module):
    """Queries, keys and values are views of one tensor, and turned round when they are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        out: torch.Tensor = x + (q @ k.t()).softmax(-1) @ v
        return out


def penalty(model: nn.Module, call: Call) -> Any:
    """WGAN-GP's: the slope of the output where it is asked is to be one."""
    x = call.args[0].detach().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (scalar_loss(output) + (slope.norm(dim=1) - 1).square().mean()).backward()
    return [output, slope]


def products(model: nn.Module, call: Call) -> Any:
    """Several products with the Hessian from one gradient, as conjugate gradients take them."""
    output = model(*call.args)
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(scalar_loss(output), parameters, create_graph=True)
    v = [s.detach() for s in slopes]
    for _ in range(3):
        along = sum(((s * d).sum() for s, d in zip(slopes, v, strict=True)), torch.zeros(()))
        v = list(torch.autograd.grad(along, parameters, retain_graph=True))
    for p, d in zip(parameters, v, strict=True):
        p.grad = d
    return [output, *v]


def some_of_the_slopes(model: nn.Module, call: Call) -> Any:
    """The other slopes keep their part of the graph, which no backward comes to."""
    output = model(*call.args)
    slopes = torch.autograd.grad(scalar_loss(output), list(model.parameters()), create_graph=True)
    slopes[-1].square().sum().backward()
    return [output, *slopes]


def inside_hooks(model: nn.Module, call: Call) -> Any:
    """Hooks of the user's own round the backward that gives gradients a graph."""

    def pack(tensor: torch.Tensor) -> Any:
        return tensor.detach().clone().numpy()

    def unpack(packed: Any) -> torch.Tensor:
        return torch.from_numpy(packed)

    output = model(*call.args)
    with saved_tensors_hooks(pack, unpack):
        slopes = torch.autograd.grad(
            scalar_loss(output), list(model.parameters()), create_graph=True
        )
    sum((s.square().sum() for s in slopes), torch.zeros(())).backward()
    return [output, *slopes]


RUNS = [penalty, products, some_of_the_slopes, inside_hooks]


@some
@pytest.mark.parametrize("run", RUNS, ids=[f.__name__ for f in RUNS])
def test_bits(run: Any, wanted: Any) -> None:
    def make() -> nn.Module:
        return Chain(Normed(), Residual(p=0.2), Attends(), UsesTwice())

    assert_exact(make, rows, wanted, run=run, steps=1)


@pytest.mark.kind("inner steps on computed weights (MAML)", bits=True)
@pytest.mark.parametrize("wanted", [PLANS["each"], PLANS["tree"], PLANS["a burst each"]])
def test_parameters_that_were_others_in_the_forward(wanted: Any) -> None:
    """What `torch.func.functional_call` does: other tensors stand in for the parameters."""

    def inner_steps(model: nn.Module, call: Call) -> Any:
        weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        for _ in range(2):
            out = torch.func.functional_call(model, weights, call.args)
            slopes = torch.autograd.grad(
                scalar_loss(out), list(weights.values()), create_graph=True
            )
            pairs = zip(weights.items(), slopes, strict=True)
            weights = {name: w - 0.1 * slope for (name, w), slope in pairs}
        out = torch.func.functional_call(model, weights, call.args)
        scalar_loss(out).backward()
        return out

    assert_exact(chain(4, 0.2), rows, wanted, run=inner_steps)


def growth(make: Callable[[], nn.Module], wanted: Any, *, again: bool) -> tuple[int, int]:
    """(bytes that a backward with ``create_graph`` leaves, peak of the next above those)."""
    model, x = seeded(make)(), wide()
    if wanted is not None:
        enforce(model, x, wanted, check=False)
    with no_collection(), Live(x, *model.parameters()) as live:
        output = model(x)
        level = live.level
        slopes = torch.autograd.grad(output.sum(), list(model.parameters()), create_graph=True)
        left = live.level - level
        if again:  # graph by graph
            torch.autograd.grad(slopes[0].sum(), list(model.parameters()), retain_graph=True)
            assert live.level - level == left
        live.peak = live.level
        level = live.level
        sum((s.square().sum() for s in slopes), torch.zeros(())).backward()
        peak = live.peak - level
        model.zero_grad()
        del output, slopes
    assert live.level == 0
    return left, peak


@plans
@pytest.mark.kind("gradients of gradients", bits=True)
def test_the_graph_of_gradients_holds_nothing_that_was_recomputed(wanted: Any) -> None:
    make = chain(4, 0.1)
    assert growth(make, wanted, again=True)[0] == growth(make, None, again=False)[0]


def test_a_backward_through_both_graphs_holds_a_region_at_a_time() -> None:
    """As deep again, and no more than the gradients of the further blocks are held."""
    eight, sixteen = (
        growth(chain(n), plan(*(f"blocks.{i}" for i in range(n))), again=False)[1] for n in (8, 16)
    )
    parameters = sum(p.numel() * 4 for p in chain(8)().parameters())
    assert sixteen - eight <= 2 * parameters


def test_each_of_the_graphs_is_recomputed_for_once() -> None:
    model = seeded(chain(4))()
    enforce(model, rows(), PLANS["each"])
    with watched() as seen:
        penalty(model, Call.of(rows()))
    # with the first backward; on the way through the slope's graph, and then through the output's
    assert seen.replays == 3 * 4


def test_hooks_round_the_backward_still_get_what_was_not_recomputed() -> None:
    def seen(wanted: Any) -> set[int]:
        """Sizes of what the user's hooks are given."""
        found: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found.add(tensor.numel())
            return tensor.detach()

        model = seeded(lambda: Chain(Residual(), nn.Tanh()))()
        if wanted is not None:
            enforce(model, rows(), wanted)
        x = rows().requires_grad_()
        output = model(x)
        with saved_tensors_hooks(pack, lambda t: t):
            torch.autograd.grad(output.sum(), x, create_graph=True)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        return found

    means_of_the_norm = {len(rows())}
    assert seen(plan("blocks.0")) == seen(None) - means_of_the_norm != seen(None)
