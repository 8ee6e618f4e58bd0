"""An optimized model is exported, scripted and traced after `revert`, and says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import ExportError, PlanError
from actckpt.rewriting.installing import installed
from tests.exact import scalar_loss
from tests.messages import said
from tests.models.blocks import chain, rows

pytestmark = pytest.mark.usefixtures("flat_profile")


def onnx(model: nn.Module, path: Path) -> Any:
    return torch.onnx.export(model, (rows(),), str(path / "model.onnx"), dynamo=False)


EXPORTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "torch.export": lambda model, _: torch.export.export(model, (rows(),)),
    "torch.onnx": onnx,
    "torch.jit.trace": lambda model, _: torch.jit.trace(model, rows()),
    "torch.jit.script": lambda model, _: torch.jit.script(model),
}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "waiting"])
@pytest.mark.parametrize("name", EXPORTS)
def test_exports_come_after_revert(name: str, planned: bool, grad: bool, tmp_path: Path) -> None:
    model = chain(2)()
    batch = rows() if planned else None
    actckpt.optimize(model, None, batch=batch, loss_fn=scalar_loss, policy="full")
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # most of these are deprecated
        text = said(
            ExportError,
            ["an optimized model can be neither exported", name.split(".")[1], "revert(model)"],
            lambda: EXPORTS[name](model, tmp_path),
        )
        assert len(text.splitlines()) == 1
        assert issubclass(ExportError, PlanError)
        assert installed(model) is not None
        if name in ("torch.jit.trace", "torch.jit.script"):  # the others are slow, or not here
            EXPORTS[name](actckpt.revert(model), tmp_path)
    model(rows())


def test_a_part_that_is_optimized() -> None:
    model = nn.Sequential(chain(2)(), nn.ReLU())
    actckpt.optimize(model[0], None, batch=rows(), policy="full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said(ExportError, ["revert(model)"], lambda: torch.jit.trace(model, rows()))


def test_a_forward_is_still_looked_at_as_a_function() -> None:
    model = actckpt.optimize(chain(2)(), 1.0)
    assert not hasattr(model.forward, "__code__")
    assert getattr(model.forward, "__globals__", None) is None
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        model.forward.anything  # type: ignore[attr-defined]  # noqa: B018
