"""What is said of optimizers and losses that are none, and of steps that depend on values."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import actckpt
from actckpt.errors import ArgumentError, TraceError
from tests.exact import scalar_loss
from tests.messages import said
from tests.models.blocks import WIDTH, chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")

OPTIMIZERS: dict[str, tuple[Any, list[str]]] = {
    "a class": (torch.optim.SGD, ["found the class SGD", "SGD(model.parameters(), lr=...)"]),
    "a name": ("adamw", ["found the text 'adamw'", "torch.optim.AdamW(model.parameters()"]),
    "a factory": (functools.partial(torch.optim.SGD, lr=0.1), ["found partial", "AdamW(model"]),
    "a list of classes": ([torch.optim.AdamW], ["found the class AdamW", "AdamW(model"]),
    "parameters": (
        [nn.Parameter(torch.ones(1))], ["found parameters", "made of the model's parameters"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_optimizer(name: str) -> None:
    given, parts = OPTIMIZERS[name]
    model = chain(2)()
    more: dict[str, Any] = {"loss_fn": scalar_loss, "optimizer": given}
    for call in (
        lambda: actckpt.optimize(model, 1.0, **more),
        lambda: actckpt.measure(model, rows(), **more),
        lambda: actckpt.trace(model, rows(), **more),
        lambda: actckpt.find_max_batch(model, 1.0, rows, **more),
    ):
        said(ArgumentError, ["optimizer must be the optimizer that steps", *parts], call, model)


def three(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (output - target * weight).mean()


def with_default(output: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    return output.mean() * scale


LOSSES: dict[str, tuple[Any, Any, list[str]]] = {
    "without its target": (
        mse_loss, None, ["loss_fn mse_loss takes two arguments", "'target'", "pass {target}="],
    ),
    "a module, without its target": (
        nn.CrossEntropyLoss(), None, ["CrossEntropyLoss takes two arguments", "pass {target}="],
    ),
    "a target too many": (
        scalar_loss, rows(), ["scalar_loss takes the output alone", "{target}= was given"],
    ),
    "a target, and no loss": (None, rows(), ["{target}= is what", "pass loss_fn="]),
    "three arguments": (three, None, ["three(output", "neither as loss_fn(output) nor as"]),
    "a class": (nn.MSELoss, rows(), ["found the class MSELoss"]),
    "a name": ("mse", None, ["must be a function of the model's output", "found 'mse'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_cannot_be_called(name: str) -> None:
    loss_fn, target, parts = LOSSES[name]
    model = chain(2)()
    make_target = None if target is None else lambda _: target
    own = [p.format(target="target") for p in parts]
    for call in (
        lambda: actckpt.optimize(model, 1.0, loss_fn=loss_fn, target=target),
        lambda: actckpt.measure(model, rows(), loss_fn=loss_fn, target=target),
        lambda: actckpt.trace(model, rows(), loss_fn=loss_fn, target=target),
    ):
        said(ArgumentError, own, call, model)
    said(
        ArgumentError,
        [p.format(target="make_target") for p in parts],
        lambda: actckpt.find_max_batch(model, 1.0, rows, loss_fn=loss_fn, make_target=make_target),
        model,
    )


def test_losses_that_can_be_called() -> None:
    model = chain(2)()
    for loss_fn in (with_default, lambda *output: output[0].mean(), functools.partial(three,
                    target=rows(), weight=rows())):  # fmt: skip
        actckpt.trace(model, rows(), loss_fn=loss_fn)
    actckpt.trace(model, rows(), loss_fn=nn.MSELoss(), target=rows())


SEEN: list[float] = []


def logs(output: torch.Tensor) -> torch.Tensor:
    SEEN.append(output.mean().item())
    return output.mean()


def branches(output: torch.Tensor) -> torch.Tensor:
    return output[output > 0].mean()


LOSS_LINES: dict[Callable[[torch.Tensor], torch.Tensor], str] = {
    logs: "in logs: SEEN.append(output.mean().item())",
    branches: "in branches: return output[output > 0].mean()",
}


@pytest.mark.parametrize("loss_fn", LOSS_LINES, ids=lambda f: f.__name__)
def test_a_loss_that_asks_for_values(loss_fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = chain(2)()
    parts = ["the loss (loss_fn) depends on the values", __file__, LOSS_LINES[loss_fn],
             "keep the number out of loss_fn", "torch.where", "leave loss_fn out"]  # fmt: skip
    waiting = actckpt.optimize(chain(2)(), 1.0, loss_fn=loss_fn)
    for call, of in (
        (lambda: actckpt.optimize(model, 1.0, batch=rows(), loss_fn=loss_fn), model),
        (lambda: waiting(rows()), waiting),
    ):
        text = said(TraceError, parts, call, of)
        assert "forward" not in text
        assert "expert" not in text
    actckpt.optimize(model, 1.0, batch=rows())  # as the message says
    actckpt.revert(model)


class Proposals(nn.Module):
    """As a region proposal network: scores of anchors, of which the best are kept, by value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)
        self.anchors = nn.Identity()

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.anchors(self.head(features)).flatten(0, -2)
        boxes, scores = found[:, :4].sigmoid(), found[:, 4]
        large = torch.where(boxes[:, 0] > 0.4)[0]
        return boxes[large], scores


class Detector(nn.Module):
    """As Faster R-CNN: a trunk, proposals of what it sees, and heads over those that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.rpn = Proposals()
        self.heads = nn.Linear(4, 3)

    def forward(
        self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        features = torch.stack([self.trunk(image) for image in images])
        boxes, scores = self.rpn(features)
        wanted = torch.cat([t["boxes"] for t in targets]).mean(0)
        return {
            "boxes": (self.heads(boxes) - wanted).square().sum(),
            "objectness": scores.square().mean(),
        }


def images_and_targets() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    return [rows(6), rows(6) * 0.5], [{"boxes": torch.ones(2, 3)}, {"boxes": torch.zeros(1, 3)}]


def trained(model: nn.Module) -> list[torch.Tensor]:
    losses = model(*images_and_targets())
    (losses["boxes"] + losses["objectness"]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return [*losses.values(), *grads]


def test_a_detector_and_the_part_of_it_that_can_be_optimized() -> None:
    model = seeded(Detector)()
    text = said(
        TraceError,
        ["the forward of rpn depends", __file__, "in forward: large = torch.where", "(Dynamic",
         "actckpt.optimize(model.trunk, ...)", "what is around it is then not bounded"],
        lambda: actckpt.optimize(model, 1.0, batch=images_and_targets()),
        model,
    )  # fmt: skip
    assert "expert" not in text
    advised = re.search(r"optimize\(model\.([\w.]+),", text)
    assert advised is not None
    actckpt.optimize(model.get_submodule(advised[1]), None, policy="full")
    expected, found = trained(seeded(Detector)()), trained(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_experts_are_advised_where_there_are_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            return y[y.argmax(-1) == 0].sum()

    model = Experts()
    said(
        TraceError,
        ["the forward of the model depends", 'experts_implementation="grouped_mm"'],
        lambda: actckpt.optimize(model, 1.0, batch=rows()),
        model,
    )
