"""What is resident before a training step, by category."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from actckpt.graph import Category


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


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a shell around others, without memory of its own."""
    # not used directly, because its TypeGuard contradicts torch.Tensor's own signatures
    return bool(is_traceable_wrapper_subclass(tensor))


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages under a tensor: those of its parts if it is sparse or a wrapper subclass."""
    if is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            part = getattr(tensor, name)
            if isinstance(part, torch.Tensor):  # a DTensor lists its mesh as well
                yield from storages(part)
    elif tensor.layout == torch.sparse_coo:
        yield from storages(tensor._indices())
        yield from storages(tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from storages(part)
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()):
            yield from storages(part)
    else:
        try:
            yield tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # opaque (mkldnn) or functional tensors have no storage of their own
