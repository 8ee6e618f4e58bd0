"""What a plan depends on besides the model: by it a batch keeps a plan or gets another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from actckpt.rewriting.record import autocast_state
from actckpt.signature import SPARSE
from actckpt.tracing.parametrized import count_cached, is_caching


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

    def difference(self, other: BatchKey) -> str:
        """What of ``other`` a plan made for this key was not made for; "" where it covers it."""
        (cast, training, trained, dtypes, cached), now = self.state, other.state
        if self.structure != other.structure:
            return f"called with {_listed(other.structure)}, not {_listed(self.structure)}"
        if cast != now[0]:
            return f"autocast is {_autocast(now[0])}, not {_autocast(cast)}"
        if training != now[1]:
            return (
                f"{sum(now[1])} of {len(now[1])} modules are in training mode, not {sum(training)}"
            )
        if trained != now[2]:
            return f"{sum(now[2])} of {len(now[2])} parameters are trained, not {sum(trained)}"
        if dtypes != now[3]:
            return "the parameters are of other dtypes"
        if cached != now[4]:
            return (
                f"torch.nn.utils.parametrize caches {now[4]} tensors, not {cached} (-1: it is off)"
            )
        if self.covers(other):
            return ""
        pairs = zip(self.shapes, other.shapes, strict=True)
        planned, found = next((a, b) for a, b in pairs if a != b)
        return f"a tensor is {found}, not {planned}"


class Contents(NamedTuple):
    """The modules of a model, each once, and their parameters, as often as modules hold them."""

    modules: list[nn.Module]
    parameters: list[nn.Parameter]


def contents(model: nn.Module) -> Contents:
    """What is in a model now; in a quarter of the time of ``model.modules()``, every forward."""
    modules: list[nn.Module] = []
    parameters: list[nn.Parameter] = []
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        modules.append(module)
        if own := module._parameters:
            parameters += [p for p in own.values() if p is not None]
        if inside := module._modules:
            stack += inside.values()
    return Contents(modules, parameters)


def batch_key(found: Contents, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchKey:
    """The key of one forward call of a model as things are now."""
    structure: list[Any] = []
    shapes: list[tuple[int, ...]] = []
    _flatten((args, kwargs), structure, shapes)
    parameters = found.parameters
    device = parameters[0].device.type if parameters else "cpu"
    state = (
        autocast_state(device),
        tuple([m.training for m in found.modules]),
        tuple([p.requires_grad for p in parameters]),
        tuple([p.dtype for p in parameters]),
        count_cached(found.modules) if is_caching() else -1,
    )
    return BatchKey(tuple(structure), tuple(shapes), state)


def _flatten(x: Any, structure: list[Any], shapes: list[tuple[int, ...]]) -> None:
    if isinstance(x, torch.Tensor):
        structure.append((x.dtype, str(x.device), x.requires_grad))
        shapes.append(tuple(x.shape))
        if x.layout in SPARSE:
            shapes.append((x._nnz(),))
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


def _listed(structure: tuple[Any, ...]) -> str:
    """Arguments in words, as `_flatten` has written them down."""
    words = []
    for item in structure[1:]:
        if isinstance(item, tuple) and isinstance(item[0], torch.dtype):
            words.append(str(item[0]).removeprefix("torch."))
        elif isinstance(item, tuple) and isinstance(item[0], type):
            inside = item[1] if isinstance(item[1], int) else "/".join(map(str, item[1]))
            words.append(f"{item[0].__name__}({inside})")
        else:
            words.append(getattr(item, "__name__", repr(item)))
    return " ".join(words)


def _autocast(state: tuple[tuple[str, bool, torch.dtype], ...]) -> str:
    """Where autocast is on."""
    on = [f"{dtype} on {device}".removeprefix("torch.") for device, is_on, dtype in state if is_on]
    return ", ".join(on) or "off"
