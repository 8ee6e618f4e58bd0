"""What a forward costs beside the model's own work, counted; and that nothing is missed for it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.session.model_contents import ModelContents
from actckpt.session.session import session_of


def layers(count: int) -> Any:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(count)))


def python_calls(work: Callable[[], object]) -> int:
    """How many Python functions are entered."""
    count = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("policy", ["auto", "calls"])
def test_a_plain_forward_asks_as_little_of_a_large_model_as_of_a_small_one(policy: str) -> None:
    counts = []
    for count in (2, 24):
        torch.manual_seed(0)
        model, x = layers(count), torch.randn(64, 8)
        optimizer = torch.optim.Adam(model.parameters())
        actckpt.optimize(model, 1.0, batch=x, policy=policy, optimizer=optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        session = session_of(model)
        assert session is not None
        counts.append(python_calls(partial(session.before_forward, (x,), {})))
    assert counts[0] == counts[1]


def same(contents: ModelContents, model: nn.Module) -> bool:
    """Whether all modules of a model and all of their parameters were found."""
    modules, parameters = contents.now()
    held = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    return {id(m) for m in modules} == {id(m) for m in model.modules()} and sorted(
        map(id, parameters)
    ) == sorted(map(id, held))


def puts_in(model: Any) -> None:
    model[1].append(nn.Linear(8, 8))


def puts_below_a_leaf(model: Any) -> None:
    model[0][1].add_module("inside", nn.Linear(8, 8))


def takes_out(model: Any) -> None:
    del model[2]


def replaces(model: Any) -> None:
    model[0][0] = nn.Linear(8, 8, bias=False)


def leaves_none(model: Any) -> None:
    model[0].register_module("1", None)


def shares(model: Any) -> None:
    model[2] = model[0]


def exchanges(model: Any) -> None:
    model[0], model[1] = model[1], model[0]


def another_parameter(model: Any) -> None:
    model[0][0].weight = nn.Parameter(torch.zeros(8, 8))


def one_more_parameter(model: Any) -> None:
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))


def no_bias(model: Any) -> None:
    model[1][0].bias = None


CHANGES = (
    puts_in,
    puts_below_a_leaf,
    takes_out,
    replaces,
    leaves_none,
    shares,
    exchanges,
    another_parameter,
    one_more_parameter,
    no_bias,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_put_in_or_taken_out_is_seen(change: Callable[[Any], None]) -> None:
    model = layers(3)
    contents = ModelContents(weakref.ref(model))
    assert same(contents, model)
    change(model)
    assert same(contents, model)
    assert same(contents, model)


def test_a_model_of_one_module_has_contents() -> None:
    model = nn.Linear(8, 8)
    contents = ModelContents(weakref.ref(model))
    assert same(contents, model)
    model.add_module("inside", nn.Linear(8, 8))
    assert same(contents, model)


def test_modules_are_not_kept_alive() -> None:
    model = layers(3)
    contents = ModelContents(weakref.ref(model))
    contents.now()
    gone, first = weakref.ref(model), weakref.ref(model[0])
    model[0] = nn.Tanh()
    assert first() is None
    contents.now()
    del model
    assert gone() is None


def test_nothing_of_a_session_outlives_its_model() -> None:
    model, x = layers(3), torch.randn(4, 8)
    actckpt.optimize(model, 1.0, policy="calls")
    for _ in range(2):
        model(x).sum().backward()
    gc.collect()  # of planning
    gone, session = weakref.ref(model), weakref.ref(session_of(model))
    del model
    assert gone() is None
    assert session() is None
