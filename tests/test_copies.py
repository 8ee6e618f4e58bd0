"""A planned model is the same object with the same keys; copies of it run their own weights."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.plan import Plan
from actckpt.rewriting.installing import installed, uninstall
from actckpt.rewriting.patch import PatchedForward
from tests.exact import differences, enforce, halves, outcome, plan, region, watched
from tests.models.blocks import Chain, Residual, rows
from tests.suite import seeded

PLANS = [
    plan(*(f"blocks.{i}" for i in range(3))),
    plan(halves("blocks", 0, 2)),
    plan(region("", None, region("blocks.1"))),
]
plans = pytest.mark.parametrize("wanted", PLANS)


def make() -> nn.Module:
    return Chain(*(Residual(p=0.1) for _ in range(3)))


def planned(wanted: Plan) -> nn.Module:
    model = seeded(make)()
    enforce(model, rows(), wanted)
    return model


def shifted(model: nn.Module, by: float = 0.05) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)
    return model


def assert_runs_its_own_weights(
    clone: nn.Module, original: nn.Module, replays: bool = True
) -> None:
    """The clone trains as an untouched model of its weights does, and leaves the original alone."""
    kept = [p.detach().clone() for p in original.parameters()]
    shifted(clone)
    expected = seeded(make)()
    expected.load_state_dict(clone.state_dict())
    with watched() as seen:
        found = outcome(clone, rows())
    assert not differences(outcome(expected, rows()), found)
    assert bool(seen.replays) == replays
    for p, before in zip(original.parameters(), kept, strict=True):
        assert torch.equal(p, before)
        assert p.grad is None


@plans
def test_deep_copies(wanted: Plan) -> None:
    model = planned(wanted)
    clone = copy.deepcopy(model)
    assert_runs_its_own_weights(clone, model)
    assert_runs_its_own_weights(copy.deepcopy(clone), clone)
    del model
    outcome(clone, rows())
    uninstall(clone)
    assert not any("forward" in m.__dict__ for m in clone.modules())


@plans
def test_deep_copy_between_forward_and_backward(wanted: Plan) -> None:
    model, expected = planned(wanted), seeded(make)()
    for m in (model, expected):
        torch.manual_seed(3)
        out = m(rows())
        clone = shifted(copy.deepcopy(m))
        out.square().sum().backward()
        assert clone.get_parameter("blocks.0.linear.weight").grad is None
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@plans
def test_averaged_models(wanted: Plan) -> None:
    """Exponential moving averages: the copy is evaluated with its own weights."""

    def train(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(3)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            model(rows()).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
            average.eval()
            with torch.no_grad():
                seen.append(average(rows()))
        average.train()
        average(rows()).sum().backward()
        return [*seen, *(p.grad for p in average.parameters() if p.grad is not None)]

    a, b = train(seeded(make)()), train(planned(wanted))
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@plans
def test_pickle(wanted: Plan) -> None:
    model = planned(wanted)
    assert_runs_its_own_weights(pickle.loads(pickle.dumps(model)), model)


@plans
def test_torch_save_of_the_whole_model(wanted: Plan, tmp_path: Path) -> None:
    model = planned(wanted)
    torch.save(model, tmp_path / "model.pt")
    assert_runs_its_own_weights(torch.load(tmp_path / "model.pt", weights_only=False), model)


@plans
def test_state_dict_and_names(wanted: Plan) -> None:
    model, plain = planned(wanted), seeded(make)()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert repr(model) == repr(plain)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer))
    model.load_state_dict(shifted(plain).state_dict())
    assert not differences(outcome(plain, rows()), outcome(model, rows()))


@plans
def test_signature_of_forward(wanted: Plan) -> None:
    model = planned(wanted)
    for m, plain in zip(model.modules(), seeded(make)().modules(), strict=True):
        assert inspect.signature(m.forward) == inspect.signature(plain.forward)


def test_moving_and_casting_a_planned_model() -> None:
    model, plain = planned(PLANS[1]).double(), seeded(make)().double()
    a = outcome(plain, rows().double())
    assert not differences(a, outcome(model, rows().double()))


def test_submodules_called_alone_run_untouched() -> None:
    model, plain = planned(PLANS[0]), seeded(make)()
    with watched() as seen:
        for m in (model, plain):
            torch.manual_seed(3)
            m.get_submodule("blocks.1")(rows()).square().sum().backward()
    assert not seen.replays
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad
        else:
            assert torch.equal(a.grad, b.grad)


def test_a_copied_submodule_runs_its_own_weights() -> None:
    model = planned(PLANS[0])
    block = shifted(copy.deepcopy(model.get_submodule("blocks.1")))
    plain = seeded(make)().get_submodule("blocks.1")
    plain.load_state_dict(block.state_dict())
    torch.manual_seed(3)
    a = plain(rows())
    torch.manual_seed(3)
    assert torch.equal(a, block(rows()))


class Doubled:
    """An instance ``forward`` as users and libraries (accelerate) set it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * 2.0
        return out


def test_a_forward_that_the_user_had_set(flat_profile: None) -> None:
    def with_own_forward() -> nn.Module:
        model = make()
        for path in ("", "blocks.1"):
            module = model.get_submodule(path)
            module.forward = Doubled(module.forward)
        return model

    expected, model = seeded(with_own_forward)(), seeded(with_own_forward)()
    before = {path: m.__dict__.get("forward") for path, m in model.named_modules()}
    actckpt.optimize(model, None, batch=rows(), loss_fn=torch.sum, policy=lambda g, p, b: PLANS[1])
    assert not differences(outcome(expected, rows()), outcome(model, rows()))
    actckpt.revert(model)
    assert {path: m.__dict__.get("forward") for path, m in model.named_modules()} == before
    assert not differences(outcome(expected, rows()), outcome(model, rows()))


def test_revert_leaves_nothing_and_twice_does_nothing(flat_profile: None) -> None:
    model = seeded(make)()
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    actckpt.optimize(model, None, batch=rows(), loss_fn=torch.sum, policy=lambda g, p, b: PLANS[1])
    assert isinstance(model.__dict__["forward"], PatchedForward)
    assert actckpt.revert(model) is model
    assert {path: set(m.__dict__) for path, m in model.named_modules()} == attributes
    assert actckpt.revert(model) is model
    assert installed(model) is None


def test_copies_of_an_optimized_model_plan_by_themselves(flat_profile: None) -> None:
    model = seeded(make)()
    actckpt.optimize(model, None, batch=rows(), loss_fn=torch.sum, policy=lambda g, p, b: PLANS[1])
    clone = copy.deepcopy(model)
    outcome(clone, rows(9))  # a larger batch: the copy plans again, the original does not
    assert actckpt.report(clone) is not actckpt.report(model)
    actckpt.revert(clone)
    assert installed(model) is not None
    loaded = pickle.loads(pickle.dumps(model))
    with watched() as seen:
        outcome(loaded, rows())
    assert seen.replays
    actckpt.revert(loaded)
    assert not any("forward" in m.__dict__ for m in loaded.modules())


def test_a_forward_under_functional_call_without_a_backward() -> None:
    model = planned(PLANS[0])
    others = {n: p.detach() * 1.1 for n, p in model.named_parameters()}
    plain = seeded(make)()
    torch.manual_seed(3)
    a = torch.func.functional_call(plain, others, (rows(),))
    torch.manual_seed(3)
    b = torch.func.functional_call(model, others, (rows(),))
    assert torch.equal(a, b)
    uninstall(model)
