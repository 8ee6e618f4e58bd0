"""Forwards that are followed in stretches: exact, whatever happens in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import actckpt
from actckpt.bursts import place_bursts
from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.recomputation import Recomputation
from actckpt.rewriting.following import Following
from actckpt.stretches import Stretches
from tests import exact
from tests.burst_plans import drawn, grouped
from tests.exact import assert_exact, differences, enforce, outcome, scalar_loss
from tests.models.blocks import Chain, Residual, chain, rows
from tests.predictions import prepared
from tests.suite import seeded


def made_under(*paths: str) -> exact.MakePlan:
    """What modules of these paths make and autograd saves is dropped, all in one burst each."""

    def make(graph: Graph) -> Plan:
        possible = Recomputation(graph)
        groups = [
            [
                s
                for s in sorted(possible.saves)
                if graph.stages[graph.ops[possible.makers[s][0]].stage].path.startswith(path)
            ]
            for path in paths
        ]
        assert all(groups)
        return grouped(graph, groups)

    return make


def seen_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each forward is shown, from now on."""
    counts: list[int] = []
    enter, see = Following.__enter__, Following.__torch_function__

    def entered(self: Following) -> Following:
        counts.append(0)
        return enter(self)

    def counted(self: Following, *args: Any) -> Any:
        counts[-1] += 1
        return see(self, *args)

    monkeypatch.setattr(Following, "__enter__", entered)
    monkeypatch.setattr(Following, "__torch_function__", counted)
    return counts


# Which calls


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["gpt2", "resnet", "t5", "siamese", "unet"])
def test_stretches_hold_what_is_needed(name: str, seed: int) -> None:
    graph = prepared(name).graph
    possible = Recomputation(graph)
    some = sorted(possible.saves)[seed :: 5 + seed]
    for plan in (drawn(seed, depth=0)(graph), grouped(graph, [[s] for s in some])):
        placed = place_bursts(possible, plan)
        what = Stretches(possible)
        needed = what.needed(placed)
        found = what.stretches(needed, placed)
        spans = [(s.first, s.last) for s in found] or [(0, len(graph.calls))]
        followed = {n for first, last in spans for n in range(first, last)}
        assert followed.issuperset(needed.tolist())
        if found:
            passed = {n for s in found for p in s.passes for n in range(p.first, p.last)}
            assert followed - passed == set(needed.tolist())
            assert what.count(needed) == (len(needed), len(passed))
        for stretch, after in itertools.pairwise(found):
            assert stretch.first < stretch.last < after.first
            assert after.begins is not None
            if stretch.rests is not None:
                assert stretch.last <= stretch.rests.at < after.first
        assert all(s.begins.at == s.first for s in found if s.begins is not None)


def test_fewer_drops_are_followed_in_fewer_calls_and_priced_so() -> None:
    p = prepared("gpt2")
    possible = Recomputation(p.graph)
    some = sorted(possible.saves)
    prices = [p.pricer.price(grouped(p.graph, [group])) for group in (some[:2], some)]
    assert 0 < 2 * prices[0].following_s < prices[1].following_s
    assert prices[1].following_s <= p.profile.follow_s * len(p.graph.calls)


# What a run sees


@pytest.mark.parametrize(
    "wanted",
    [made_under("blocks.2"), made_under("blocks.1", "blocks.5"), made_under("blocks.7")],
    ids=["one", "two", "last"],
)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_what_lies_between_is_not_seen_and_all_is_exact(
    wanted: exact.MakePlan, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = seen_calls(monkeypatch)
    assert_exact(chain(8, p), rows, wanted, must_replay=False)
    calls = 8 * 5
    assert counts[0] >= calls  # the first step is seen whole
    assert all(0 < count <= calls // 2 for count in counts[1:])
    assert len(counts) == exact.STEPS


@pytest.mark.parametrize("seed", range(8))
def test_drawn_drops_are_exact(seed: int) -> None:
    def wanted(graph: Graph) -> Plan:
        some = sorted(Recomputation(graph).saves)[seed :: 3 + seed]
        return grouped(graph, [some[::2], some[1::2]])

    assert_exact(chain(9, 0.1), rows, wanted, check=False, must_replay=False)


# What changes between them


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


def changes(make: exact.Make, wanted: exact.MakePlan) -> bool:
    """Asserts that two steps as traced and one that is not are exact; whether it was noticed."""
    make = seeded(make)

    def run() -> exact.Body:
        count = [0]

        def step(root: nn.Module, call: Any) -> Any:
            for module in root.modules():
                if count[0] == 2 and hasattr(type(module), "other"):
                    setattr(module, "other", True)  # noqa: B010
            count[0] += 1
            return exact.body(root, call)

        return step

    expected = outcome(make(), rows(), run(), steps=3)
    model = make()
    enforce(model, rows(), wanted)
    found = outcome(model, rows(), run(), steps=3)
    assert not differences(expected, found)
    return bool(model.__dict__["forward"].rewrite.diverged)


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


# What is on torch's stack of modes


class Mode(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class UnderMode(nn.Module):
    """Runs its blocks under modes of its own, one entered in the middle of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.blocks[0](x))
        with Mode():
            x = self.blocks[2](x)
            with torch.device("cpu"):
                x = self.blocks[4](self.blocks[3](x))
        out: torch.Tensor = self.blocks[5](x) + torch.zeros(8)
        return out


@pytest.mark.parametrize("block", range(6))
def test_modes_of_the_models_own_stay_in_their_places(block: int) -> None:
    assert_exact(UnderMode, rows, made_under(f"blocks.{block}"), must_replay=False)
    with Mode() as outer:
        assert_exact(UnderMode, rows, made_under(f"blocks.{block}"), must_replay=False)
        assert _get_current_function_mode_stack() == [outer]
    assert not _get_current_function_mode_stack()


def test_a_mode_that_was_not_there_before_is_noticed() -> None:
    class Sometimes(UnderMode):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for n, block in enumerate(self.blocks):
                with Mode() if n == 4 and self.under else nullcontext():
                    x = block(x)
            return x

        under = False

    def run() -> exact.Body:
        count = [0]

        def step(root: nn.Module, call: Any) -> Any:
            Sometimes.under = count[0] == 2
            count[0] += 1
            return exact.body(root, call)

        return step

    make = seeded(Sometimes)
    expected = outcome(make(), rows(), run(), steps=3)
    model = make()
    Sometimes.under = False
    enforce(model, rows(), made_under("blocks.1", "blocks.4"))
    assert not differences(expected, outcome(model, rows(), run(), steps=3))
    assert model.__dict__["forward"].rewrite.diverged
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("block", [0, 2, 4])
def test_a_forward_that_raises_leaves_nothing_behind(block: int) -> None:
    model = seeded(chain(6))()
    force = enforce(model, rows(), made_under("blocks.1", "blocks.3"))
    expected = outcome(seeded(chain(6))(), rows())

    def fail(*_: Any) -> None:
        raise ValueError("as the user's code does")

    handle = force.model.get_submodule(f"blocks.{block}.linear").register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="as the user's"):
            model(rows())
        assert not _get_current_function_mode_stack()
    handle.remove()
    assert not differences(expected, outcome(model, rows()))


def test_a_module_that_is_called_twice_is_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.own = Residual(), Residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.shared(x)
            out: torch.Tensor = self.shared(self.own(x))
            return out

    assert_exact(Twice, rows, made_under("own"), must_replay=False)
    assert_exact(Twice, rows, made_under("shared"), must_replay=False)


def test_an_optimized_model_is_seen_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(chain(12))()
    loss: Callable[[torch.Tensor], torch.Tensor] = scalar_loss
    whole = actckpt.measure(model, rows(512), loss_fn=loss, steps=1)
    budget_gb = 0.9 * whole.peak_bytes / 1e9
    actckpt.optimize(model, budget_gb, batch=rows(512), loss_fn=loss, policy="optimal")
    counts = seen_calls(monkeypatch)
    for _ in range(2):
        loss(model(rows(512))).backward()
        model.zero_grad()
    assert counts[1] < 0.7 * counts[0]
