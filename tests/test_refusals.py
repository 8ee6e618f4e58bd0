"""What no region may be: refused with the reason, and the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import actckpt
from actckpt.errors import PlanError, ReplayError
from actckpt.policies import POLICIES
from tests.exact import (
    assert_exact,
    differences,
    enforce,
    halves,
    outcome,
    plan,
    region,
    scalar_loss,
)
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded


def assert_untouched(model: nn.Module) -> None:
    assert not any("forward" in m.__dict__ for m in model.modules())


class Checkpoints(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = Residual()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_models_that_checkpoint_themselves(reentrant: bool) -> None:
    model = Chain(Residual(), Checkpoints(reentrant))
    with pytest.raises(PlanError, match="already checkpoints itself"):
        actckpt.optimize(model, 1.0, batch=rows(requires_grad=True), loss_fn=scalar_loss)
    assert_untouched(model)
    scalar_loss(model(rows(requires_grad=True))).backward()


def test_hugging_face_gradient_checkpointing() -> None:
    from tests.test_replay_caches import gpt2, ids

    model = gpt2(use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(PlanError, match="gradient_checkpointing_disable"):
        actckpt.optimize(model, 1.0, batch=ids())
    assert_untouched(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_data_parallel(wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner = chain()()
    model = wrap(inner)
    with pytest.raises(PlanError, match="inner module first"):
        actckpt.optimize(model, 1.0, batch=rows())
    assert_untouched(model)


class Mutates(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1.0
        return x.sin()


class Sets(nn.Module):
    """Leaves a tensor in an attribute that the next stage reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.left: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).tanh()
        self.left = y.exp()
        return y


class Reads(nn.Module):
    def __init__(self, source: Sets) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.source = [source]  # hidden from nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.source[0].left is not None
        out: torch.Tensor = self.linear(x * self.source[0].left).sin()
        return out


def hand_over() -> nn.Module:
    sets = Sets()
    return Chain(Residual(), sets, Reads(sets), Residual())


def test_an_attribute_set_by_one_stage_and_read_by_the_next() -> None:
    for wanted in (
        plan("blocks.2"),
        plan(region("blocks.1", "blocks.2")),
        plan(region("blocks.0", "blocks.3")),
    ):
        with pytest.raises(PlanError, match="no argument of the call"):
            enforce(hand_over(), rows(), wanted)
    assert_exact(hand_over, rows, plan("blocks.0", "blocks.1", "blocks.3"))
    assert_exact(hand_over, rows, plan(""))


class CallsAutograd(nn.Module):
    """A force field: differentiates inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.requires_grad_()
            energy = self.linear(z).tanh().square().sum()
            (force,) = torch.autograd.grad(energy, z, create_graph=True)
        return force


def test_a_forward_that_calls_autograd() -> None:
    def make() -> nn.Module:
        return Chain(Residual(), CallsAutograd(), Residual())

    for wanted in (plan("blocks.1"), plan(region("blocks.0", "blocks.2"))):
        with pytest.raises(PlanError, match="runs autograd in its forward"):
            enforce(make(), rows(), wanted)
    with pytest.raises(PlanError, match=r"contains blocks\.1, which cannot be recomputed"):
        enforce(make(), rows(), plan(""))
    assert_exact(make, rows, plan("blocks.0", "blocks.2"))


def test_regions_inside_a_root_that_calls_autograd() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x.detach().requires_grad_()
            y = x
            for block in self.blocks:
                y = block(y)
            energy = y.sin().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy, force

    assert_exact(Forces, rows, plan("blocks.0", "blocks.2"))
    assert_exact(Forces, rows, plan(halves("blocks", 0, 2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_modules_are_not_recomputed() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.scripted(self.linear(x)).exp()
            return out

    def make() -> nn.Module:
        return Chain(Residual(), Holds(), Residual())

    with pytest.raises(PlanError, match="has no call"):
        enforce(make(), rows(), plan("blocks.1.scripted"))
    for wanted in (plan("blocks.1"), plan(region("blocks.0", "blocks.2"))):
        with pytest.raises(PlanError, match="ScriptModule"):
            enforce(make(), rows(), wanted)
    assert_exact(make, rows, plan("blocks.0", "blocks.2"), steps=5)


class Box:
    """An object of the user's own that a stage may change."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_opaque_arguments() -> None:
    class Opens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, box: Box) -> torch.Tensor:
            out: torch.Tensor = self.linear(box.x).tanh()
            return out

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Residual(), Opens()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(Box(self.a(x)))
            return out

    with pytest.raises(PlanError, match="neither tensor, container nor plain value"):
        enforce(Boxes(), rows(), plan("b"))
    assert_exact(Boxes, rows, plan("a"))


def test_a_generator_of_its_own() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(x.shape, generator=self.generator)
            out: torch.Tensor = (self.linear(x) * noise).exp()
            return out

    def make() -> nn.Module:
        return Chain(Residual(), Draws())

    with pytest.raises(PlanError, match="generator of its own"):
        enforce(make(), rows(), plan("blocks.1"))
    assert_exact(make, rows, plan("blocks.0"))


def test_a_list_that_a_forward_appends_to() -> None:
    """Auxiliary losses collected in a list: a recomputation would append them again."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.losses: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x).tanh()
            self.losses.append(y.square().mean())
            return y.exp()

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Collects() for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(())
            for block in self.blocks:
                assert isinstance(block, Collects)
                block.losses.clear()
                x = block(x)
                total = total + sum(block.losses)
            return x.sum() + total

    with pytest.raises(PlanError, match="changes the list losses"):
        enforce(Sums(), rows(), plan("blocks.0", "blocks.1"))
    with pytest.raises(PlanError, match=r"contains blocks\.0"):
        enforce(Sums(), rows(), plan(""))


def test_a_tensor_attribute_that_is_read_and_rebound() -> None:
    """State that is no buffer: a recomputation would find the new value."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.state = torch.zeros(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x) + self.state
            self.state = y.detach().mean(0)
            result: torch.Tensor = y.exp().sin()
            return result

    def make() -> nn.Module:
        return Chain(Residual(), Moves(), Residual())

    for wanted in (plan("blocks.1"), plan(region("blocks.0", "blocks.2"))):
        with pytest.raises(PlanError, match="state"):
            enforce(make(), rows(), wanted)
    assert_exact(make, rows, plan("blocks.0", "blocks.2"))


def test_torch_func_over_a_region() -> None:
    model = chain(2)()
    enforce(model, rows(), plan("blocks.0", "blocks.1"))
    x = rows()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, p, (x,)).sum()
        return out

    with pytest.raises(PlanError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters)
    scalar_loss(model(rows())).backward()


class Routes(nn.Module):
    """Goes another way each time it runs, at the same shapes."""

    def __init__(self, same_shapes: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.turns = [0]
        self.same_shapes = same_shapes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = self.turns[0]
        self.turns[0] += 1
        if turn % 2:
            x = self.b(x).sin()
            return x.exp() if self.same_shapes else x.exp().sin() * x
        out: torch.Tensor = self.a(x).sin().exp()
        return out


@pytest.mark.parametrize("same_shapes", [True, False])
@pytest.mark.parametrize("wanted", [plan("blocks.1"), plan(halves("blocks", 0, 1))])
def test_a_forward_that_changes_between_record_and_replay(same_shapes: bool, wanted: Any) -> None:
    model = Chain(Residual(), Routes(same_shapes))
    routes = model.get_submodule("blocks.1")
    assert isinstance(routes, Routes)
    # hide the list's change from the trace: this is about what no trace can see
    turns, routes.turns = routes.turns, _Quiet([0])
    enforce(model, rows(), wanted)
    routes.turns = turns
    out = model(rows())
    with pytest.raises(ReplayError, match=r"blocks\.1") as caught:
        scalar_loss(out).backward()
    assert len(str(caught.value).splitlines()) <= 10


class _Quiet(list[int]):
    """A list that does not change."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@pytest.mark.parametrize("policy", ["full", "sqrt", "log", "selective"])
def test_named_policies_go_around_what_is_refused(policy: str, flat_profile: None) -> None:
    def make() -> nn.Module:
        return Chain(Residual(), Residual(), Mutates(), Residual(), CallsAutograd(), Residual())

    assert policy in POLICIES
    expected, model = seeded(make)(), seeded(make)()
    actckpt.optimize(model, None, batch=rows(), loss_fn=scalar_loss, policy=policy)
    assert actckpt.report(model).plan.regions
    assert not differences(outcome(expected, rows()), outcome(model, rows()))
    actckpt.revert(model)
    assert_untouched(model)
