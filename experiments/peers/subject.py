"""One model to compare on: its batch, its loss, its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.suite import call


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks that a model calls one after the other from a loop over ``owner.attribute``."""

    owner: str
    attribute: str
    blocks: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model and the batch of its step.

    Args:
        what: sizes, for the table.
        blocks: what people checkpoint: the paths of its blocks, in the order of their calls.
        chain: the same or larger parts as one chain; None where none holds them all.
        target: labels, where the loss is computed outside the model (cross-entropy).
    """

    what: str
    model: nn.Module
    batch: Any
    blocks: tuple[str, ...]
    chain: Callable[[nn.Module], Chain] | None = None
    target: torch.Tensor | None = None

    @property
    def loss(self) -> dict[str, Any]:
        """Keyword arguments of `actckpt.optimize` that say what the loss is."""
        return {} if self.target is None else {"loss_fn": cross_entropy, "target": self.target}

    def loss_of(self, output: Any) -> torch.Tensor:
        """The scalar that backward starts from."""
        if self.target is not None:
            return cross_entropy(output, self.target)
        loss: torch.Tensor = output["loss"]
        return loss

    def step(self, model: nn.Module) -> Callable[[], None]:
        """One forward and backward from gradients None; the output stays until backward ends."""

        def run() -> None:
            model.zero_grad(set_to_none=True)
            output = call(model, self.batch)
            self.loss_of(output).backward()

        return run


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy; classes are dimension 1."""
    return nn.functional.cross_entropy(output, target)


def numbered(path: str, count: int) -> tuple[str, ...]:
    """The paths of what a ModuleList holds."""
    return tuple(f"{path}.{i}" for i in range(count))


def listed(owner: str, attribute: str) -> Callable[[nn.Module], Chain]:
    """The chain of what a ModuleList holds."""

    def chain(model: nn.Module) -> Chain:
        held = getattr(model.get_submodule(owner), attribute)
        return Chain(owner, attribute, tuple(held))

    return chain
