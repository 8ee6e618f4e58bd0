"""A value in the dtype of the tensor that it goes into, where that is still the same value."""

from __future__ import annotations

import torch

from actckpt.checkpoint.dtypes import name_of
from actckpt.errors import CheckpointMismatchError


def cast_to(value: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> torch.Tensor:
    """A value in another dtype of the same kind.

    Raises:
        CheckpointMismatchError: it is of another kind, or would no longer be what it was.
    """
    reason = ""
    if _kind(value.dtype) != _kind(dtype):
        reason = "which is another kind of number: load them into a model of that kind first"
    else:
        made = value.to(dtype)
        if value.is_floating_point() or value.is_complex():
            if not torch.equal(_is_finite(value), _is_finite(made)):
                reason = "in which some of its finite values would not be: choose a wider dtype"
        elif not torch.equal(made.long(), value.long()):
            reason = "in which some of its values have no place"
    if reason:
        raise CheckpointMismatchError(
            f"{where} has {name} as {name_of(value.dtype)}, wanted is {name_of(dtype)}, {reason}"
            ". Nothing was changed"
        )
    return made


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype == torch.bool else "integer"


def _is_finite(x: torch.Tensor) -> torch.Tensor:
    # float8 lacks the operation
    return torch.isfinite(x.float() if x.itemsize == 1 else x)
