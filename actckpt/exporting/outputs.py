"""What a model is given and gives, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from actckpt.errors import WeightsExportError

LOGITS = "logits"
# by argument
Inputs = Mapping[str, torch.Tensor]
Run = Callable[[Inputs], torch.Tensor]


def first_output(output: Any) -> torch.Tensor:
    """The tensor that a model's output begins with, its logits where it has some.

    Raises:
        WeightsExportError: it has no tensor.
    """
    logits = getattr(output, LOGITS, None)
    if isinstance(logits, torch.Tensor):
        return logits
    found = dict(flattened(output))
    if not found:
        raise WeightsExportError(
            f"a call gives no tensor but {type(output).__name__}: return a tensor, or a dict or "
            "tuple of some"
        )
    return found.get(LOGITS, next(iter(found.values())))


def flattened(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all in an output, in the order in which torch flattens it.

    Names are the keys, numbers in a sequence, joined by underscores: ``hidden_states_0``.
    """
    if isinstance(output, torch.Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from flattened(value, f"{name}_{key}" if name else str(key))
    elif isinstance(output, (tuple, list)):
        keys = getattr(output, "_fields", None)
        before = name if name or keys else "output"
        for key, value in zip(keys or range(len(output)), output, strict=True):
            yield from flattened(value, f"{before}_{key}" if before else str(key))


def running(model: nn.Module) -> Run:
    """What a model in evaluation mode makes of inputs."""

    def run(given: Inputs) -> torch.Tensor:
        with torch.no_grad():
            return first_output(model(**given))

    return run


def blank(model: nn.Module) -> nn.Module:
    """A copy of which nothing can be told but by what it loads."""
    made = deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    return made


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest deviation of an element, as a share of the largest finite one.

    Raises:
        WeightsExportError: they are of different shapes.
    """
    if found.shape != wanted.shape:
        raise WeightsExportError(
            f"an output is of shape {list(found.shape)}; the model's is {list(wanted.shape)}"
        )
    if not wanted.numel():
        return 0.0
    one, other = found.double(), wanted.double()
    # of masked elements, infinities are no deviation from the same, nor a measure of others
    apart = torch.where(one == other, 0.0, (one - other).abs())
    finite = other.abs()[other.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    return float(apart.max()) / (largest or 1.0)
