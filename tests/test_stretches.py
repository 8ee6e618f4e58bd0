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
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.stretches import Stretches
from actckpt.rewriting.following import Following
from tests import exact
from tests.burst_plans import drawn, everything, grouped, made_under
from tests.exact import assert_exact, changes, differences, enforce, outcome, scalar_loss
from tests.models.blocks import Residual, chain, rows
from tests.predictions import prepared
from tests.suite import seeded


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
            assert what.count(needed) == (len(needed), len(passed), len(found))
        for stretch, after in itertools.pairwise(found):
            assert stretch.first < stretch.last < after.first
            assert after.begins is not None
            if stretch.rests is not None:
                assert stretch.last <= stretch.rests.at < after.first
        assert all(s.begins.at == s.first for s in found if s.begins is not None)


def test_every_call_is_needed_where_a_custom_function_saves() -> None:
    graph = prepared("custom_function").graph
    possible = Recomputation(graph)
    placed = place_bursts(possible, everything(graph))
    what = Stretches(possible)
    needed = what.needed(placed)
    assert needed.tolist() == list(range(len(graph.calls)))
    assert what.stretches(needed, placed) == ()


def test_fewer_drops_are_followed_in_fewer_calls_and_priced_so() -> None:
    p = prepared("gpt2")
    possible = Recomputation(p.graph)
    some = sorted(possible.saves)
    prices = [p.pricer.price(grouped(p.graph, [group])) for group in (some[:2], some)]
    assert 0 < 2 * prices[0].following_s < prices[1].following_s
    most_s = (p.profile.follow_s + p.profile.stretch_s / 4) * len(p.graph.calls)
    assert prices[1].following_s <= most_s


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
    assert not changes(UnderMode, made_under(f"blocks.{block}"))
    with Mode() as outer:
        assert not changes(UnderMode, made_under(f"blocks.{block}"))
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

    assert not changes(Twice, made_under("own"))
    assert not changes(Twice, made_under("shared"))


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
