"""What is said of models and batches that no step can be planned for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import ArgumentError, PlanError, TraceError
from tests.exact import scalar_loss
from tests.messages import said
from tests.models.blocks import WIDTH, chain, rows

pytestmark = pytest.mark.usefixtures("flat_profile")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return chain(2)()


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules say that they are new
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LazyLinear(WIDTH))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found: nn.Module = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    return found


def made_in_inference() -> nn.Module:
    with torch.inference_mode():
        return chain(2)()


# what the model is -> (how it is made, the error, what is said of it)
MODELS: dict[str, tuple[Callable[[], nn.Module], type[Exception], list[str]]] = {
    "on meta": (
        on_meta,
        PlanError,
        ["blocks.0", "on the meta device", "to_empty", "actckpt plan TARGET --device h100"],
    ),
    "lazy": (
        lazy,
        PlanError,
        ["1.weight has no shape yet", "LazyLinear", "model(batch) once under torch.no_grad()"],
    ),
    "scripted": (
        scripted, PlanError, ["this is a ScriptModule", "torch.nn.Module that it was made of"],
    ),
    "made in inference mode": (
        made_in_inference,
        TraceError,
        ["torch.inference_mode()", "blocks.0", "torch.no_grad(), or use tensor.clone()"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_which_no_step_can_be_planned(name: str) -> None:
    make, kind, parts = MODELS[name]
    model = make()
    calls: list[Callable[[], Any]] = [
        lambda: actckpt.optimize(model, 1.0),  # not only at the first forward
        lambda: actckpt.optimize(model, 1.0, batch=rows(), loss_fn=scalar_loss),
        lambda: actckpt.measure(model, rows(), loss_fn=scalar_loss),
        lambda: actckpt.trace(model, rows(), loss_fn=scalar_loss),
        lambda: actckpt.find_max_batch(model, 1.0, rows, loss_fn=scalar_loss),
    ]
    assert len({said(kind, parts, call, model) for call in calls}) == 1


def test_what_is_no_model() -> None:
    for given, found in ((nn.Linear, "the class Linear"), (len, "builtin_function_or_method")):
        no_model: Any = given
        with pytest.raises(ArgumentError, match=f"must be a torch.nn.Module; found {found}"):
            actckpt.optimize(no_model, 1.0)


def test_inference_mode() -> None:
    model = chain(2)()
    for call in (
        lambda: actckpt.optimize(model, 1.0, batch=rows(), loss_fn=scalar_loss),
        lambda: actckpt.measure(model, rows(), loss_fn=scalar_loss),
        lambda: actckpt.trace(model, rows(), loss_fn=scalar_loss),
        lambda: actckpt.find_max_batch(model, 1.0, rows, loss_fn=scalar_loss),
    ):
        with torch.inference_mode():
            said(PlanError, ["inside torch.inference_mode()", "call it outside"], call, model)


def test_a_plan_is_made_in_inference_mode_only_for_what_trains() -> None:
    model = actckpt.optimize(chain(2)(), 1.0, loss_fn=scalar_loss)
    with torch.inference_mode():
        batch = rows()
        model(batch)
    parts = ["torch.inference_mode()", "one of the batch", "torch.no_grad(), or use tensor.clone()"]
    for call in (
        lambda: model(batch),
        lambda: actckpt.optimize(model, 1.0, batch=batch, loss_fn=scalar_loss),
    ):
        said(TraceError, parts, call, model)
    scalar_loss(model(batch.clone())).backward()


class Nests(nn.Module):
    """Makes a nested tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a prototype, torch says
            nested = torch.nested.as_nested_tensor([self.linear(x[:1]), self.linear(x[1:])])
        return nested.to_padded_tensor(0.0).sum()


def ragged_rows(_: int = 0) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor([torch.ones(2, WIDTH), torch.ones(3, WIDTH)])


def test_nested_strided_tensors_as_arguments() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    parts = ["ragged (nested) tensors", "one is an argument", "pad the batch, or pack it"]
    waiting = actckpt.optimize(nn.Linear(WIDTH, WIDTH), 1.0)
    for call, of in (
        (lambda: actckpt.optimize(model, 1.0, batch=ragged_rows()), model),
        (lambda: actckpt.trace(model, ragged_rows()), model),
        (lambda: actckpt.find_max_batch(model, 1.0, ragged_rows), model),
        (lambda: waiting(ragged_rows()), waiting),
    ):
        said(TraceError, parts, call, of)


def test_nested_strided_tensors_made_by_the_model() -> None:
    model = Nests()
    said(
        TraceError,
        ["ragged (nested) tensors", __file__, "as_nested_tensor([self.linear", "pad the batch"],
        lambda: actckpt.optimize(model, 1.0, batch=rows()),
        model,
    )
