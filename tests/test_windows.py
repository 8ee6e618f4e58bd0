"""Calls that only look at a result are not compared: what they give is told by where it lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import actckpt
from actckpt.data.graph import Graph
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.stretches import Stretches
from actckpt.interpreting.windows import Windows
from tests.burst_plans import everything, made_under
from tests.exact import assert_exact, changes, enforce, outcome
from tests.models.blocks import Chain, Residual, rows
from tests.predictions import prepared

Look = Callable[[torch.Tensor], torch.Tensor]


class Looks(nn.Module):
    """Heads as attention has them: between two products a module shows one in another shape.

    Args:
        looks: what is shown to the second product, as traced and afterwards.
    """

    class Shape(nn.Module):
        other = False

        def __init__(self, *looks: Look) -> None:
            super().__init__()
            self.looks = looks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.looks[-1 if self.other else 0](x)

    def __init__(self, *looks: Look) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 8)
        self.shape = Looks.Shape(*looks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.shape(self.first(x).sin())
        out: torch.Tensor = self.second(heads.cos()).sum(dim=1)
        return out


def halves(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2, 4)


def made(*looks: Look) -> Callable[[], nn.Module]:
    return lambda: Chain(Residual(), Looks(*looks), Residual())


def traced(*looks: Look) -> Graph:
    torch.manual_seed(0)
    return actckpt.trace(Looks(*looks), rows(), loss_fn=lambda out: out.square().sum())


def names(graph: Graph) -> list[str]:
    found = Windows(graph, frozenset(Recomputation(graph).makers))
    return [json.loads(graph.calls[n].text)[0] for n in sorted(found.calls)]


# Which calls


@pytest.mark.parametrize(
    "look",
    [
        halves,
        lambda x: x.unflatten(1, (2, 4)),
        lambda x: torch.reshape(x, (-1, 2, 4)),
        lambda x: x.unsqueeze(1).expand(-1, 2, 8)[:, :, 2:6],
        lambda x: x.view(-1, 2, 4).transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["view", "unflatten", "reshape", "expand and slice", "copied between"],
)
def test_windows_are_traced_to_what_a_call_made(look: Look) -> None:
    graph = traced(look)
    windows = Windows(graph, frozenset(Recomputation(graph).makers))
    assert windows.calls
    returned = {
        wire: graph.values[value].storage
        for call in graph.calls
        for wire, value in enumerate(call.outputs, call.wire)
    }
    for wire, origin in windows.origins.items():
        assert returned[wire] == returned[origin]
        assert origin not in windows.origins
        assert windows.origin(wire) == windows.origin(origin) == origin


def test_what_copies_or_leaves_autograd_does_more_than_look() -> None:
    graph = traced(lambda x: x.to(torch.float64).float().detach().view(-1, 2, 4))
    assert names(graph) == ["torch.Tensor.view"]
    graph = traced(lambda x: halves(nn.functional.dropout(x, 0.5)))
    assert names(graph) == ["torch.Tensor.view"]
    graph = traced(lambda x: halves(nn.functional.dropout(x, 0.5, False).to(torch.float32)))
    assert len(names(graph)) == 3


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_attention_is_followed_without_its_shapes(name: str) -> None:
    graph = prepared(name).graph
    possible = Recomputation(graph)
    what = Stretches(possible)
    placed = place_bursts(possible, everything(graph))
    needed = set(what.needed(placed).tolist())
    assert len(what.windows.calls) > len(graph.calls) / 8
    shown = {source.call for source in what.sources(placed).values()}
    assert not needed & (what.windows.calls.keys() - shown)


# What a run takes


def test_windows_are_passed_and_all_is_exact() -> None:
    graph = traced(halves)
    possible = Recomputation(graph)
    plan = everything(graph)
    needed = Stretches(possible).needed(place_bursts(possible, plan)).tolist()
    look = next(n for n, c in enumerate(graph.calls) if '"torch.Tensor.view"' in c.text)
    assert look not in needed
    assert {look - 1, look + 1} <= set(needed)
    assert_exact(made(halves), rows, made_under("blocks.1"))


def test_a_window_may_be_taken_by_another_call() -> None:
    assert not changes(made(halves, lambda x: x.unflatten(1, (2, 4))), made_under("blocks.1"))


def beside(look: Look) -> Look:
    """As many calls as others, of which nothing comes."""

    def found(x: torch.Tensor) -> torch.Tensor:
        x.detach().view(-1).sin()
        return look(x)

    return found


def test_a_window_of_another_result_is_noticed() -> None:
    def of_another(x: torch.Tensor) -> torch.Tensor:
        x.detach().view(-1)
        return halves(x * 1.0)

    assert changes(made(beside(halves), of_another), made_under("blocks.1"))


def test_a_result_that_is_changed_through_a_window_is_not_made_again() -> None:
    def touched(x: torch.Tensor) -> torch.Tensor:
        x.detach().view(-1).mul_(2.0)
        return halves(x)

    class Cosine(Looks):
        """Saves what it is given for the cosine alone, after it was changed."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.shape(self.first(x)).cos()).sum(dim=1)
            return out

    assert changes(
        lambda: Chain(Residual(), Cosine(beside(halves), touched), Residual()),
        made_under("blocks.1.first"),
    )


def test_a_forward_that_detaches_is_followed_in_every_step() -> None:
    def detached(x: torch.Tensor) -> torch.Tensor:
        return halves(x) + halves(x.detach())

    assert not changes(made(detached), everything)
    assert_exact(made(detached), rows, everything)


def test_what_autograd_knows_no_base_of_is_followed_to_what_was_made() -> None:
    def of_another(x: torch.Tensor) -> torch.Tensor:
        x.detach().view(-1)
        y = x * 2.0
        return halves(x) * halves(y.detach())

    traced_as = beside(lambda x: halves(x) * halves(x.detach()))
    assert changes(made(traced_as, of_another), made_under("blocks.1"))
    assert not changes(made(traced_as), made_under("blocks.1"))


def test_modes_of_the_users_own_do_not_see_how_windows_are_told() -> None:
    class Notes(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.asked: set[str] = set()

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            getter = func.__name__ == "__get__"
            self.asked.add(func.__self__.__name__ if getter else func.__name__)
            return func(*args, **(kwargs or {}))

    model = made(halves)()
    enforce(model, rows(), made_under("blocks.1"))
    outcome(model, rows(), steps=1)
    with Notes() as mode:
        model(rows())
    assert {"linear", "cos"} <= mode.asked
    assert not {"_base", "storage_offset"} & mode.asked
