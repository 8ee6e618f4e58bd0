"""By the end of the first optimizer step it is known, and said, whether a plan is in use."""

from __future__ import annotations

import copy
import gc
import logging
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import PlanError
from tests.exact import scalar_loss, watched
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")
make = seeded(chain(3, 0.1))
Step = Callable[[nn.Module], Any]
each_way = pytest.mark.parametrize("batch", [None, rows(64)], ids=["lazily", "at once"])


def optimized(model: nn.Module, batch: torch.Tensor | None = None, **more: Any) -> nn.Module:
    return actckpt.optimize(model, None, policy="full", loss_fn=scalar_loss, batch=batch, **more)


def train(
    model: nn.Module, step: Step = lambda m: m(rows(64)), steps: int = 3
) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        scalar_loss(step(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


# ---- something else stands in the place of the forward


def assigned(model: nn.Module) -> None:
    """As TRL's trainers: a method of the trainer's own, which may call the forward, or not."""
    original = model.forward

    def fused_forward(self: Any, x: torch.Tensor, fused: bool = True) -> Any:
        return self.blocks[0](x) + self.blocks[1](x) if fused else original(x)

    model.forward = types.MethodType(fused_forward, model)


def without_it(model: nn.Module) -> None:
    blocks = list(model.get_submodule("blocks").children())
    model.forward = lambda x: blocks[0](x) + blocks[1](x)


def removed(model: nn.Module) -> None:
    model.__dict__.pop("forward", None)


@pytest.mark.kind("forward replaced after optimize", bits=True, peak="said")
@each_way
@pytest.mark.parametrize("replace", [assigned, without_it, removed])
def test_a_forward_that_was_replaced_is_told_and_planned_from_then_on(
    replace: Callable[[nn.Module], None],
    batch: torch.Tensor | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    untouched = make()
    replace(untouched)
    expected = train(untouched)
    model = optimized(make(), batch)
    replace(model)
    with watched() as seen:
        first = train(model, steps=1)
    assert not seen.replays
    (told,) = said(caplog)
    assert "without a plan" in told
    assert "call actckpt.optimize after" in told
    model.load_state_dict(first)
    model = make()
    replace(optimized(model, batch))
    with watched() as seen:
        assert equal(expected, train(model))
    assert seen.replays
    assert actckpt.report(model).plan.regions
    assert len(said(caplog)) == 2
    actckpt.revert(model)
    assert equal(train(untouched, steps=1), train(model, steps=1))


def test_a_wrapper_that_calls_it_is_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    model = optimized(make())
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    train(model)
    other = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # nor is an optimizer that steps more than once for one forward
        other.step()
    assert not said(caplog)


# ---- the loop calls something else


@pytest.mark.kind("the loop calls another module", peak="said")
@each_way
def test_a_loop_that_calls_a_module_inside(
    batch: torch.Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = optimized(make(), batch)
    train(model, lambda m: m.get_submodule("blocks.1")(rows(64)))
    (told,) = said(caplog)
    assert "the forward of the Chain was never called" in told
    assert ("nothing is planned" in told) == (batch is None)


@pytest.mark.kind("a copy is trained in the model's place", peak="said")
@each_way
def test_a_copy_made_before_is_trained(
    batch: torch.Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    clone = copy.deepcopy(model)
    optimized(model, batch)
    train(clone)
    (told,) = said(caplog)
    assert "other parameters of the same shapes" in told


def test_a_copy_made_after_has_the_plan_and_averages_are_no_copies(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = optimized(make(), rows(64))
    average = torch.optim.swa_utils.AveragedModel(model)
    clone = copy.deepcopy(model)
    train(model)
    average.update_parameters(model)
    with watched() as seen:
        train(clone)
    assert seen.replays
    assert not said(caplog)


def test_models_that_take_turns_are_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    first, second = optimized(make()), optimized(make(), rows(64))
    train(first)
    train(second)
    train(nn.Linear(8, 8))
    assert not said(caplog)


def test_reverted_nothing_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    model = optimized(make(), rows(64))
    actckpt.revert(model)
    train(model)
    model = optimized(make(), rows(64))
    without_it(model)
    actckpt.revert(model)
    train(model)
    assert not said(caplog)
    assert not hasattr(model.forward, "rewrite")


# ---- what can be known at the call


@pytest.mark.kind("optimizer of another model", peak="said")
def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = make(), torch.optim.Adam(make().parameters())
    given: dict[str, Any] = {"loss_fn": scalar_loss, "optimizer": other}
    for call in (
        lambda: actckpt.optimize(model, 1.0, **given),
        lambda: actckpt.optimize(model, 1.0, batch=rows(), **given),
        lambda: actckpt.trace(model, rows(), **given),
        lambda: actckpt.measure(model, rows(), **given),
        lambda: actckpt.find_max_batch(model, 1.0, rows, limit=2, **given),
    ):
        with pytest.raises(PlanError, match=r"Adam given as optimizer steps none"):
            call()
    assert "forward" not in model.__dict__
    in_part = torch.optim.Adam([*model.get_submodule("blocks.0").parameters()])
    actckpt.optimize(model, 1.0, batch=rows(), loss_fn=scalar_loss, optimizer=in_part)


@pytest.mark.kind("batch= that the loop never calls like that", bits=True, peak="said")
@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda m: m(x=rows(64)), "called with tuple(0) dict(x) float32, not tuple(1) float32"),
        (lambda m: m(rows(64).bfloat16().float().requires_grad_()), "called with"),
        (lambda m: m(rows(96)), "a tensor is (96, 8), not (64, 8)"),
        (lambda m: m.eval()(rows(64)), "0 of 14 modules are in training mode, not 14"),
    ],
)
def test_a_batch_that_the_loop_does_not_give(
    step: Step, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(make(), step)
    model = optimized(make(), rows(64))
    with watched() as seen:
        assert equal(expected, train(model, step))
    assert seen.replays
    (told,) = said(caplog)
    assert words in told
    assert "not the one that batch= stood for" in told


# ---- sharded since


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def error_of(model: nn.Module) -> str:
    """What a step raises; without its traceback, whose tensors may have lost their memory."""
    try:
        scalar_loss(model(rows(64))).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.kind("sharded after optimize", peak="said")
@pytest.mark.usefixtures("one_process")
@each_way
@pytest.mark.parametrize("inside", [True, False], ids=["in parts", "whole"])
def test_a_model_that_was_sharded_is_refused_at_its_first_forward(
    inside: bool, batch: torch.Tensor | None
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = optimized(make(), batch)
    for block in model.get_submodule("blocks").children() if inside else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        assert re.match(r"PlanError: .* was sharded .* after actckpt\.optimize", error_of(model))
    actckpt.revert(model)
    scalar_loss(model(rows(64))).backward()
    with pytest.raises(PlanError, match="DTensor"):
        actckpt.optimize(model, 1.0)


def test_a_model_goes_though_its_loss_holds_it() -> None:
    def step() -> weakref.ref[nn.Module]:
        model = make()

        def loss(out: torch.Tensor) -> torch.Tensor:
            return scalar_loss(out) + sum(p.square().sum() for p in model.parameters())

        actckpt.optimize(model, None, policy="full", loss_fn=loss, batch=rows(64))
        train(model, steps=1)
        return weakref.ref(model)

    gone = step()
    gc.collect()
    assert gone() is None
