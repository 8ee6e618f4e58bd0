"""Forwards and backwards within `torch.nn.utils.parametrize.cached`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import actckpt
from tests.exact import scalar_loss, watched
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")
Norm = Callable[[nn.Module], nn.Module]


def make(norm: Norm) -> nn.Module:
    def built() -> nn.Module:
        model = chain(3, 0.1)()
        for block in model.get_submodule("blocks").children():
            norm(block.get_submodule("linear"))
        return model

    return seeded(built)()


def train(model: nn.Module, forwards: int, inside: bool) -> list[torch.Tensor]:
    """Backward within the context, or after it, when what was kept is forgotten."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(3):
        with parametrize.cached():
            losses = [scalar_loss(model(rows(64) + n)) for n in range(forwards)]
            if inside:
                sum(losses, torch.zeros(())).backward()
        if not inside:
            sum(losses, torch.zeros(())).backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found += [b.clone() for b in model.buffers()]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.kind("parametrize.cached()", bits=True)
@pytest.mark.parametrize(
    ("inside", "norm"),
    [(True, weight_norm), (False, spectral_norm)],
    ids=["backward within", "backward after"],
)
def test_recomputed_with_what_the_forward_found(inside: bool, norm: Norm) -> None:
    for forwards in (1, 2):
        expected = train(make(norm), forwards, inside)
        model = actckpt.optimize(make(norm), None, policy="full", loss_fn=scalar_loss)
        with watched() as seen:
            found = train(model, forwards, inside)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert seen.replays
        assert not parametrize._cache


@pytest.mark.kind("parametrize.cached(), one forward", bits=True, peak="within")
def test_a_step_stays_within_the_budget() -> None:
    def added(model: nn.Module) -> int:
        with parametrize.cached():
            measured = actckpt.measure(model, rows(256), loss_fn=scalar_loss, steps=1)
        return measured.added_bytes

    expected = train(make(weight_norm), 1, False)
    budget = 0.7 * added(make(weight_norm))
    model = actckpt.optimize(
        make(weight_norm), budget / 1e9, scope="activations", loss_fn=scalar_loss
    )
    assert added(model) <= budget
    plan = actckpt.report(model).plan
    assert plan.bursts or plan.regions
    found = train(model, 1, False)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("within", [True, False])
def test_looking_at_a_model_keeps_no_fakes(within: bool) -> None:
    def weights() -> list[torch.Tensor]:
        return [block.get_submodule("linear").weight for block in blocks]  # type: ignore[misc]

    model = make(weight_norm)
    blocks = list(model.get_submodule("blocks").children())
    with parametrize.cached() if within else nullcontext():
        before = weights()
        actckpt.trace(model, rows(64), loss_fn=scalar_loss)
        assert all(a is b for a, b in zip(before, weights(), strict=True)) == within
    assert not parametrize._cache
