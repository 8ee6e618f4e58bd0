"""Forwards that are followed in stretches, and then are not the traced ones: exact all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from tests.burst_plans import everything, made_under
from tests.exact import MakePlan, changes
from tests.models.blocks import Chain, Residual
from tests.suite import seeded


class Other(nn.Module):
    """Between two blocks: does something else once ``other`` is set."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.other:
            return x.cos()
        out: torch.Tensor = self.linear(x.sin()).relu().square() * 0.5
        return out


class Touched(nn.Module):
    """A result is changed in place by a module that only read it, before it is saved."""

    other = False

    class Side(nn.Module):
        other = False

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if self.other:
                hidden.add_(1.0)
            with torch.no_grad():
                found: torch.Tensor = hidden.mean().sin().cos().abs().detach()
            return found

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.side = Touched.Side()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        self.side(hidden)
        out: torch.Tensor = self.second(hidden)
        return out


class Picked(nn.Module):
    """A module in between takes a window of a result."""

    class Pick(nn.Module):
        other = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.detach().sin().cos().abs().sqrt()
            out = x[:, 4:] if self.other else x[:, :4]
            x.detach().sin().cos().abs().sqrt()
            return out

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 8)
        self.pick = Picked.Pick()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.pick(self.first(x)))
        return out


class Swapped(nn.Module):
    """Calls its two blocks in another order once ``other`` is set."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Residual(), Residual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.right, self.left) if self.other else (self.left, self.right)
        out: torch.Tensor = second(first(x))
        return out


def test_what_changes_between_stretches_is_free_to() -> None:
    make = seeded(lambda: Chain(Residual(), Other(), Residual(), Other(), Residual(), Residual()))
    assert not changes(make, made_under("blocks.0.linear", "blocks.5.linear"))


def test_what_changes_within_them_is_noticed() -> None:
    assert changes(lambda: Chain(Residual(), Other(), Residual()), made_under("blocks.1"))
    assert changes(
        lambda: Chain(Residual(), Residual(), Swapped(), Residual(), Residual()),
        made_under("blocks.2.left"),
    )


def test_a_result_that_is_changed_in_place_between_stretches_is_not_made_again() -> None:
    assert changes(lambda: Chain(Touched(), Residual()), made_under("blocks.0.first"))


def test_windows_of_a_result_are_followed_wherever_they_are_taken() -> None:
    assert changes(lambda: Chain(Picked(), Residual()), made_under("blocks.0.first"))


# What a reader is given


class Windows(nn.Module):
    """A module that is not compared takes windows of a result for two that are."""

    class Cut(nn.Module):
        other = False

        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.twice = twice

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x.detach().sin().cos().abs().sqrt()
            one = x[:]
            two = x[:] if self.twice else one
            if self.other:
                two = (2.0 * x)[:]
            x.detach().sin().cos().abs().sqrt()
            return one, two

    class Wave(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().cos()

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.cut = nn.Linear(8, 8), Windows.Cut(twice)
        self.left, self.right = Windows.Wave(), Windows.Wave()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.cut(self.first(x))
        out: torch.Tensor = self.left(left) - self.right(right)
        return out


@pytest.mark.parametrize("twice", [True, False], ids=["two windows", "one window"])
@pytest.mark.parametrize("paths", [("left", "right"), ("left",), ("right",)], ids=str)
def test_windows_that_become_others_are_told_apart(paths: tuple[str, ...], twice: bool) -> None:
    noticed = changes(
        lambda: Chain(Windows(twice), Residual()), made_under(*(f"blocks.0.{p}" for p in paths))
    )
    assert noticed or len(paths) == 1  # one reader may be given whatever there is


class Aliased(nn.Module):
    """Reads a parameter through a tensor that no module holds, and later another tensor."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.tables = [self.first.bias.detach(), torch.full((8,), 0.5)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) * self.tables[0]
        out: torch.Tensor = hidden.sin() * self.tables[1 if self.other else 0]
        return out.sin()


def test_tensors_of_unknown_origin_are_not_taken_for_the_parameters_that_they_view() -> None:
    changes(lambda: Chain(Aliased(), Residual()), everything)


def doubled_tanh(x: torch.Tensor) -> torch.Tensor:
    """One torch function that changes what it is given, and then reads it."""
    if has_torch_function_unary(x):
        out: torch.Tensor = handle_torch_function(doubled_tanh, (x,), x)
        return out
    return x.mul_(2.0).tanh()


class Doubled(nn.Module):
    class Tail(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled_tanh(x) * 0.5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tail = nn.Linear(8, 8), Doubled.Tail()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tail(self.first(x))
        return out


@pytest.mark.parametrize("wanted", [everything, made_under("blocks.1.tail")])
def test_an_argument_is_read_as_its_function_left_it(wanted: MakePlan) -> None:
    assert not changes(lambda: Chain(Residual(), Doubled(), Residual()), wanted)


# What ends early or is touched inside a stretch


class TouchedAtOnce(nn.Module):
    """As `Touched`, by one call in the same forward."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        with torch.no_grad():
            hidden.add_(1.0) if self.other else hidden.sin()
        out: torch.Tensor = self.second(hidden)
        return out


def test_one_call_that_is_let_pass_must_not_change_a_result() -> None:
    assert changes(lambda: Chain(TouchedAtOnce(), Residual()), made_under("blocks.0.first"))


class Halved(nn.Module):
    """Leaves its second half out once ``other`` is set."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Residual(), Residual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        out: torch.Tensor = x if self.other else self.second(x)
        return out


@pytest.mark.parametrize("paths", [("1",), ("1", "3"), ("1.second", "3"), ("1.second",)], ids=str)
def test_a_block_that_ends_early_is_noticed(paths: tuple[str, ...]) -> None:
    wanted = made_under(*(f"blocks.{p}" for p in paths))
    assert changes(lambda: Chain(Residual(), Halved(), Residual(), Residual()), wanted)
