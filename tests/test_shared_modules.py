"""Models with modules in common: a default argument's Identity, a backbone, parent and child."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import PlanError
from tests.exact import differences, outcome, plan, scalar_loss, watched
from tests.models.blocks import Chain, Residual, chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")
# as in ``def __init__(self, act=nn.Identity())``: one module for all models
SHARED = nn.Sequential(nn.GELU(), nn.Tanh())


class Body(nn.Module):
    def __init__(self, act: nn.Module = SHARED) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 32), act, nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.act(self.first(x)))
        return out


def make() -> nn.Module:
    return Chain(*(Body() for _ in range(3)))


def recomputed(path: str = "blocks.0.act") -> Any:
    """A policy that recomputes the shared module, whose first path is `path`."""
    return lambda graph, profile, budget: plan(path, "blocks.2")


def optimized(model: nn.Module, **more: Any) -> nn.Module:
    return actckpt.optimize(model, None, **{"policy": recomputed(), "loss_fn": scalar_loss, **more})


@pytest.fixture(autouse=True)
def _nothing_on_the_shared_one() -> Any:
    yield
    gc.collect()
    # the patch of a model that is gone is inert, and goes with the next plan that meets it
    optimized(make(), batch=rows())
    SHARED.__dict__.pop("forward", None)


@pytest.mark.kind("module shared between models", bits=True)
@pytest.mark.parametrize("batch", [None, rows()], ids=["in the first step", "at once"])
def test_a_module_without_weights_is_recomputed_in_both(batch: torch.Tensor | None) -> None:
    expected = outcome(seeded(make)(), rows())
    models = [optimized(seeded(make)(), batch=batch) for _ in range(2)]
    for model in (*models, *reversed(models)):
        model.load_state_dict(seeded(make)().state_dict())
        with watched() as seen:
            assert not differences(expected, outcome(model, rows()))
        assert any("blocks.0.act" in label for label in seen.labels)


def test_one_is_reverted_or_gone_and_the_other_keeps_its_plan() -> None:
    expected = outcome(seeded(make)(), rows())
    first, second, third = (optimized(seeded(make)(), batch=rows()) for _ in range(3))
    actckpt.revert(second)
    del first
    gc.collect()
    with watched() as seen:
        assert not differences(expected, outcome(second, rows()))
    assert not seen.replays
    with watched() as seen:
        assert not differences(expected, outcome(third, rows()))
    assert any("blocks.0.act" in label for label in seen.labels)
    actckpt.revert(third)
    fourth = optimized(seeded(make)(), batch=rows())
    actckpt.revert(fourth)
    assert "forward" not in SHARED.__dict__


def test_a_step_of_both_at_once() -> None:
    def both(a: nn.Module, b: nn.Module) -> list[torch.Tensor]:
        scalar_loss(a(rows()) + b(rows(requires_grad=True))).backward()
        scalar_loss(b(a(rows()))).backward()
        return [p.grad for m in (a, b) for p in m.parameters() if p.grad is not None]

    expected = both(seeded(make)(), seeded(make, 1)())
    found = both(
        optimized(seeded(make)(), batch=rows()), optimized(seeded(make, 1)(), batch=rows())
    )
    assert len(expected) == len(found)
    assert all(torch.equal(p, q) for p, q in zip(expected, found, strict=True))


@pytest.mark.parametrize("batch", [None, rows()], ids=["in the first step", "at once"])
def test_a_backbone_in_two_models_is_refused_until_one_is_gone(batch: torch.Tensor | None) -> None:
    backbone = chain(2)()
    first = actckpt.optimize(Chain(backbone, Residual()), 1.0, batch=batch, loss_fn=scalar_loss)
    second = Chain(Residual(), backbone)
    with pytest.raises(PlanError, match=r"blocks\.1 is in the middle of another plan.*blocks\.0"):
        actckpt.optimize(second, 1.0, batch=batch, loss_fn=scalar_loss)
    assert "forward" not in second.__dict__
    first.holder = [first]  # type: ignore[assignment]  # only the collector finds it
    del first
    actckpt.optimize(second, 1.0, batch=batch, loss_fn=scalar_loss)
    expected = outcome(seeded(lambda: Chain(Residual(), chain(2)()))(), rows())
    second.load_state_dict(seeded(lambda: Chain(Residual(), chain(2)()))().state_dict())
    assert not differences(expected, outcome(second, rows()))


@pytest.mark.kind("a parent and its child both optimized", peak="said")
@pytest.mark.parametrize(("child_first", "batch"), [(True, None), (False, None), (False, rows())])
def test_a_parent_and_its_child(child_first: bool, batch: torch.Tensor | None) -> None:
    parent = Chain(chain(2)(), Residual())
    child = parent.get_submodule("blocks.0")
    first, second = (child, parent) if child_first else (parent, child)
    actckpt.optimize(first, 1.0, batch=batch, loss_fn=scalar_loss)
    with pytest.raises(PlanError, match=r"blocks\.0"):
        actckpt.optimize(second, 1.0, batch=batch, loss_fn=scalar_loss)
    actckpt.revert(second)  # not optimized: nothing happens to the other's plan
    outcome(parent, rows())
    actckpt.report(first)
    actckpt.revert(first)
    actckpt.optimize(second, 1.0, batch=batch, loss_fn=scalar_loss)


def test_looking_at_a_parent_or_a_child_leaves_the_others_plan() -> None:
    expected = outcome(seeded(lambda: Chain(make(), Residual()))(), rows())
    parent = seeded(lambda: Chain(make(), Residual()))()
    child = parent.get_submodule("blocks.0")
    optimized(child)
    alone = actckpt.trace(parent, rows(), loss_fn=scalar_loss)
    outcome(child, rows(), lr=0.0)
    assert actckpt.trace(parent, rows(), loss_fn=scalar_loss) == alone
    with watched() as seen:
        assert not differences(expected, outcome(parent, rows()))
    assert seen.replays
    actckpt.revert(child)
    optimized(parent, policy=lambda *_: plan("blocks.0"), batch=rows())
    actckpt.trace(child, rows(), loss_fn=scalar_loss)
    with watched() as seen:
        outcome(parent, rows())
    assert seen.replays


def test_a_copy_of_a_part_of_an_optimized_model_is_free() -> None:
    from copy import deepcopy

    parent = optimized(Chain(make(), Residual()), policy=lambda *_: plan("blocks.0"), batch=rows())
    part = deepcopy(parent.get_submodule("blocks.0"))
    optimized(part, batch=rows())
    with watched() as seen:
        outcome(part, rows())
    assert seen.replays
