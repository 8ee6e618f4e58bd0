"""Attributes of objects that have no state of their own: compared, kept and put back."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from actckpt.checkpoint.encoding import encode
from actckpt.errors import CheckpointSaveError
from actckpt.resuming.batch_digest import MOST_OBJECTS, BatchDigest, batch_digest

# longer lists are not written as JSON with every checkpoint
_LONGEST = 100_000


def attribute_digest(value: Any) -> str:
    """Of an attribute; "" where it cannot be looked into."""
    digest = read_attribute(value)
    return "" if digest.omitted else digest.text


def read_attribute(
    value: Any,
    *,
    most_objects: int = MOST_OBJECTS,
    apart: Callable[[Any], bool] = lambda x: False,
) -> BatchDigest:
    """The digest of an attribute, whose tensors are read whole; of a function, what it holds.

    Args:
        most_objects, apart: as for `batch_digest`.
    """
    try:
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            value = [value.__qualname__, cells, list(value.__defaults__ or ())]
        elif isinstance(value, type | types.BuiltinFunctionType):
            value = value.__qualname__
        return batch_digest(value, whole=True, most_objects=most_objects, apart=apart)
    except Exception as error:  # it may be anything, and its own code fail in any way
        why = (f"{type(error).__name__}: {error!s:.80}",)
        return BatchDigest("", why, why)


def kept_attribute(value: Any, key: str) -> Any:
    """A copy of a value that a checkpoint can hold.

    Raises:
        CheckpointSaveError: none can.
    """
    if isinstance(value, list | dict | tuple | set) and len(value) > _LONGEST:
        raise CheckpointSaveError(f"{key} has {len(value)} entries")
    try:
        encode(value, key)
        # a tensor with a graph behind it cannot be copied, and is none of a checkpoint's
        memo: dict[int, Any] = {}
        for x in tree_leaves(value):
            if isinstance(x, torch.Tensor) and not x.is_leaf:
                memo[id(x)] = copy.deepcopy(x.detach(), memo)
        return copy.deepcopy(value, memo)
    except CheckpointSaveError:
        raise
    except Exception as error:  # of the value's own code, which saving must outlive
        raise CheckpointSaveError(f"{key}: {error}") from error


def put_attribute(owner: Any, name: str, value: Any) -> None:
    """In place where that can be done: others may hold the same list."""
    live: Any = getattr(owner, "__dict__", {}).get(name)
    if type(live) is type(value) is list:
        live[:] = value
    elif type(live) is type(value) and isinstance(live, dict):
        live.clear()
        live.update(value)
    elif isinstance(live, torch.Tensor | np.ndarray) and _alike(live, value):
        with torch.no_grad():
            live[...] = value
    else:
        setattr(owner, name, value)


def _alike(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype
