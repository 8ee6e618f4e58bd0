"""What a plan depends on besides the model: by it a batch keeps a plan or gets another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from actckpt.rewriting.record import autocast_state


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The arguments' structure, the tensors' shapes, and the model's and autocast's state."""

    structure: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    state: tuple[Any, ...]

    def covers(self, other: BatchKey) -> bool:
        """Whether a plan made for this key bounds a step of ``other``: no dimension is larger."""
        return (
            self.structure == other.structure
            and self.state == other.state
            and all(
                len(a) == len(b) and all(y <= x for x, y in zip(a, b, strict=True))
                for a, b in zip(self.shapes, other.shapes, strict=True)
            )
        )


def batch_key(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchKey:
    """The key of one forward call of ``model`` as things are now."""
    structure: list[Any] = []
    shapes: list[tuple[int, ...]] = []
    _flatten((args, kwargs), structure, shapes)
    modules = list(_walk(model))
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    device = parameters[0].device.type if parameters else "cpu"
    state = (
        autocast_state(device),
        tuple(m.training for m in modules),
        tuple((p.requires_grad, p.dtype) for p in parameters),
    )
    return BatchKey(tuple(structure), tuple(shapes), state)


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model; in a quarter of the time of ``model.modules()``, every forward."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(m for m in module._modules.values() if m is not None)


def _flatten(x: Any, structure: list[Any], shapes: list[tuple[int, ...]]) -> None:
    if isinstance(x, torch.Tensor):
        structure.append((x.dtype, str(x.device), x.requires_grad))
        shapes.append(tuple(x.shape))
    elif isinstance(x, Mapping):
        structure.append((type(x), tuple(x)))
        for value in x.values():
            _flatten(value, structure, shapes)
    elif isinstance(x, (list, tuple)):
        structure.append((type(x), len(x)))
        for value in x:
            _flatten(value, structure, shapes)
    elif is_dataclass(x) and not isinstance(x, type):
        structure.append(type(x))
        for f in fields(x):
            _flatten(getattr(x, f.name, None), structure, shapes)
    elif x is None or isinstance(x, (bool, int, float, str)):
        structure.append(x)
    else:
        structure.append(type(x))
