"""What is resident before a training step, by category."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from actckpt.data.graph import Category
from actckpt.tracing.parts import parts


def resident_bytes(model: torch.nn.Module, optimizer: Any, batch: Any) -> dict[Category, int]:
    """Bytes of parameters, buffers, gradients, optimizer state and batch on the model's device.

    Each storage counts once, in the first category that holds it, in the order above.

    Args:
        optimizer: one, several, or None; what is inside counts, an optimizer that it wraps too.
        batch: tensors in any nesting of containers, mappings, dataclasses and plain objects.
    """
    parameters = list(model.parameters())
    buffers = list(model.buffers())
    first = next(iter(parameters + buffers), None)
    device = torch.device("cpu") if first is None else first.device
    seen: set[int] = set()
    result = {}
    for category, holder in (
        (Category.PARAMETER, parameters),
        (Category.BUFFER, buffers),
        (Category.GRADIENT, [p.grad for p in parameters if p.grad is not None]),
        (Category.OPTIMIZER, optimizer),
        (Category.BATCH, batch),
    ):
        total = 0
        for tensor in tensors(holder):
            if tensor.device != device:
                continue
            for storage in storages(tensor):
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    total += storage.nbytes()
        result[category] = total
    return result


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable through containers, mappings (keys too), dataclasses and objects."""
    seen: set[int] = set()
    stack = [tree]
    while stack:
        x = stack.pop()
        if x is None or isinstance(x, (str, bytes, bool, int, float, complex, type)):
            continue
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, Mapping):
            stack.extend(x.keys())
            stack.extend(x.values())
        elif isinstance(x, (list, tuple, set, frozenset, deque)):
            stack.extend(x)
        elif is_dataclass(x):
            stack.extend(getattr(x, f.name, None) for f in fields(x))
        elif not callable(x) and hasattr(x, "__dict__"):
            stack.extend(vars(x).values())


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages under a tensor: those of its parts if it is sparse or a wrapper subclass."""
    for part in parts(tensor):
        if is_lazy(part):
            continue  # of a module that takes its shape from its first batch: nothing is there yet
        try:
            yield part.untyped_storage()
        except (NotImplementedError, RuntimeError):
            continue  # functional tensors have no storage of their own


def sizes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of every storage under tensors, by address."""
    return {s._cdata: s.nbytes() for t in tensors for s in storages(t)}
