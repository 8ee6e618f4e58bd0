"""In-place changes: a replay gives autograd's gradient or autograd's error, never another value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.errors import PlanError, ReplayError
from tests.exact import (
    assert_exact,
    differences,
    enforce,
    halves,
    outcome,
    plan,
    region,
    saving,
    scalar_loss,
)
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded


class Glue(nn.Module):
    """Blocks with the user's own in-place code between them."""

    def __init__(self, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(p=0.1) for _ in range(3)])
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        for block in self.blocks:
            x = self.change(x, block(x))
        return x


CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "output scaled": lambda x, y: y.mul_(1.5),
    "output plus input": lambda x, y: y.add_(x),
    "slice of the output": lambda x, y: (y[:, :2].zero_(), y)[1],
    "output through a view": lambda x, y: (y.view(-1).clamp_(min=-0.5), y)[1],
    "relu in place": lambda x, y: nn.functional.relu(y, inplace=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(
    "wanted", [plan("blocks.0", "blocks.1", "blocks.2"), plan(region("", None, region("blocks.1")))]
)
def test_stage_output_changed_in_place_between_stages(change: Any, wanted: Plan) -> None:
    assert_exact(lambda: Glue(change), rows, wanted)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_region_over_stages_ends_where_an_output_was_changed(
    change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Planned on a model whose glue is plain, run on one that changes in place: the links break."""
    for wanted in (plan(region("blocks.0", "blocks.2")), plan(halves("blocks", 0, 2))):
        make = seeded(lambda: Glue(lambda x, y: y))
        expected, planned = make(), make()
        enforce(planned, rows(), wanted)
        expected.change = planned.change = change
        a, b = outcome(expected, rows()), outcome(planned, rows())
        assert not [n for n in a if not torch.equal(a[n], b[n])]
        assert "its region ends before it" in caplog.text
        assert caplog.text.count("its region ends before it") == 1
        caplog.clear()


def test_a_region_over_stages_that_are_not_linked_is_refused() -> None:
    model = Glue(lambda x, y: y.mul_(1.5))
    with pytest.raises(PlanError, match=r"cannot span blocks\.1"):
        enforce(model, rows(), plan(region("blocks.0", "blocks.2")))


class ActsFirst(nn.Module):
    """Autograd does not save its input, so changing that later is legal."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear((x + 1.0).tanh())
        return out


class InPlaceResidual(nn.Module):
    """``x += block(x)``: the block's input changes after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ActsFirst() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2.0
        for block in self.blocks:
            x += block(x)
        return x


def test_an_input_that_is_changed_after_the_call() -> None:
    """Legal without a plan, so planning must refuse it: no error may come at backward."""
    model = InPlaceResidual()
    scalar_loss(model(rows())).backward()
    with pytest.raises(PlanError, match="in place"):
        enforce(model, rows(), plan("blocks.1"))


def test_an_input_that_is_changed_after_planning_raises_as_autograd_would() -> None:
    model = chain(2)()
    enforce(model, rows(), plan("blocks.0"))
    x = rows() * 1.0
    out = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class ChangesItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2.0).sin()


def test_a_stage_that_changes_its_own_input_is_refused() -> None:
    def make() -> nn.Module:
        return Chain(Residual(), ChangesItsInput(), Residual())

    for wanted in (plan("blocks.1"), plan(region("blocks.0", "blocks.2"))):
        with pytest.raises(PlanError, match="changes an argument in place"):
            enforce(make(), rows(), wanted)
    # its neighbours, and what encloses it, may be regions
    assert_exact(make, rows, plan("blocks.0", "blocks.2"))
    assert_exact(make, rows, plan(""))


class InPlaceChain(nn.Module):
    """Convolution, normalisation, activation and dropout, the last two in place; a view, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.fall = nn.Conv1d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y[:, :1].mul_(0.5)
        y = nn.functional.relu(y, inplace=True)
        z: torch.Tensor = self.fall(y)
        z = nn.functional.dropout(z, 0.3, inplace=True).sigmoid_()
        return x + z.flatten(1).view_as(x)


def signals() -> torch.Tensor:
    return torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("aten.convolution",),
        ("aten.relu_",),
        ("aten.native_batch_norm",),
        ("aten.native_batch_norm", "aten.relu_"),
        ("aten.sigmoid_",),
        ("aten.convolution", "aten.mul_"),
        ("aten.bernoulli_",),
    ],
)
def test_in_place_chains_saved_whole_in_part_or_not_at_all(
    names: tuple[str, ...], prune: bool
) -> None:
    def make() -> nn.Module:
        return Chain(InPlaceChain(), InPlaceChain())

    def wanted(g: Graph) -> Plan:
        return plan(
            *(
                region(f"blocks.{i}", saved=saving(g, f"blocks.{i}", *names) if names else ())
                for i in range(2)
            )
        )

    try:
        assert_exact(make, signals, wanted, prune=prune)
    except AssertionError as error:
        if "nothing is pruned" not in str(error) and "no operation was skipped" not in str(error):
            raise


class ChangedLater(nn.Module):
    """A result that autograd does not save, read by one operation and then changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        z = (y + 1.0).exp()
        result: torch.Tensor = y.mul_(0.5) + z
        return result


def saving_products(stage: str) -> Callable[[Graph], Plan]:
    return lambda g: plan(region(stage, saved=saving(g, stage, "aten.addmm")))


def test_a_captured_result_that_changes_after_the_replays_end() -> None:
    def make() -> nn.Module:
        return Chain(ChangedLater(), ChangedLater())

    with pytest.raises(AssertionError, match="nothing is pruned"):
        assert_exact(make, rows, saving_products("blocks.0"), prune=True)
    assert_exact(make, rows, saving_products("blocks.0"))


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return y, (y + 1.0).exp()


class ChangesWhatItGot(nn.Module):
    def __init__(self, changes: bool = True) -> None:
        super().__init__()
        self.block = Returns()
        self.changes = changes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.block(x)
        if self.changes:
            y.view(-1)[:3].mul_(2.0)
        result: torch.Tensor = y + z
        return result


def test_a_captured_output_that_the_caller_changes() -> None:
    with pytest.raises(AssertionError, match="nothing is pruned"):
        assert_exact(ChangesWhatItGot, rows, saving_products("block"), prune=True)
    assert_exact(ChangesWhatItGot, rows, saving_products("block"))


def test_a_captured_output_that_the_caller_changes_though_it_did_not_when_traced() -> None:
    def run(planned: bool) -> dict[str, torch.Tensor]:
        model = seeded(lambda: ChangesWhatItGot(changes=False))()
        if planned:
            enforce(model, rows(), saving_products("block"), prune=True)
        assert isinstance(model, ChangesWhatItGot)
        first = outcome(model, rows())
        model.changes = True
        return {**first, **{f"changing {k}": t for k, t in outcome(model, rows()).items()}}

    assert not differences(run(False), run(True))


class Illegal(nn.Module):
    """Changes what autograd saved: an error without a plan."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        z = y.sin()
        y.add_(1.0)
        return (y + z).exp()


def test_changing_a_saved_tensor_raises_as_without_a_plan() -> None:
    model = Chain(Residual(), Illegal())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar_loss(model(rows())).backward()
    enforce(model, rows(), plan("blocks.1"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar_loss(model(rows())).backward()


@pytest.mark.parametrize("which", ["blocks.0.linear.weight", "blocks.1.norm.bias"])
@pytest.mark.parametrize("wanted", [plan("blocks.0", "blocks.1"), plan(halves("blocks", 0, 1))])
def test_parameters_changed_before_backward_raise(which: str, wanted: Plan) -> None:
    model = chain(2)()
    enforce(model, rows(), wanted)
    for _ in range(2):  # the first step compares bits, the second relies on versions alone
        out = model(rows())
        with torch.no_grad():
            model.get_parameter(which).mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            out.sum().backward()
        assert len(str(caught.value).splitlines()) <= 10
        model(rows()).sum().backward()


def test_a_buffer_changed_before_backward_raises() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(WIDTH))
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.scale, torch.Tensor)
            out: torch.Tensor = self.linear((x + self.scale).exp())
            return out

    model = Chain(Scaled(), Scaled())
    enforce(model, rows(), plan("blocks.0", "blocks.1"), check=False)
    out = model(rows())
    model.get_buffer("blocks.1.scale").add_(1)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.scale"):
        out.sum().backward()


def test_saved_tensors_that_stay_refuse_an_in_place_change() -> None:
    """What a region keeps is guarded like autograd's own."""

    class Exposes(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x.exp()
            return y, y.sin().exp()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.block = nn.Linear(WIDTH, WIDTH), Exposes()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out: tuple[torch.Tensor, torch.Tensor] = self.block(self.linear(x))
            return out

    model = Two()
    enforce(model, rows(), lambda g: plan(region("block", saved=saving(g, "block", "aten.exp"))))
    y, z = model(rows())
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_views_of_saved_tensors() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(-1, 3, 2, WIDTH // 2).transpose(0, 2).unbind(1)
            weights = (q @ k.transpose(1, 2)).softmax(-1)
            out = (weights @ v).transpose(0, 1).reshape(-1, WIDTH)
            result: torch.Tensor = out + x.t().contiguous().t().exp()
            return result

    for names in ((), ("aten.addmm",), ("aten.bmm",), ("aten._softmax", "aten.addmm")):
        for prune in (False, True) if names else (False,):
            assert_exact(
                lambda: Chain(Views(), Views()),
                rows,
                lambda g, names=names: plan(  # type: ignore[misc]
                    region("blocks.0", saved=saving(g, "blocks.0", *names) if names else ()),
                    "blocks.1",
                ),
                prune=prune,
            )


def test_replay_errors_are_short_and_name_the_region() -> None:
    model = chain(2)()
    enforce(model, rows(), plan("blocks.1"))
    out = model(rows())
    forward = Residual.forward
    try:
        Residual.forward = lambda self, x: x.exp()  # type: ignore[method-assign]
        with pytest.raises(ReplayError, match=r"blocks\.1") as caught:
            out.sum().backward()
    finally:
        Residual.forward = forward  # type: ignore[method-assign]
    assert len(str(caught.value).splitlines()) <= 10
