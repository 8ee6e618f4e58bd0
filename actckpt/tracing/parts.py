"""The strided tensors that others are made of: wrapper subclasses and sparse tensors."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from actckpt.errors import TraceError
from actckpt.tracing.signature import PARTS, SPARSE


def is_of_nested(error: BaseException) -> bool:
    """Whether torch raised it over a nested tensor, whose ragged size is no number."""
    if isinstance(error, UnsupportedOperatorException) and "nested" in str(error.func):
        return True
    return any("/torch/nested/" in f.filename for f in traceback.extract_tb(error.__traceback__))


def ragged(where: str) -> TraceError:
    """The error for nested tensors; ``where`` they were met."""
    return TraceError(
        f"ragged (nested) tensors are not supported: {where}.\n"
        "A step is planned from the size of every tensor, and theirs differ from batch to batch "
        "without a number that says so.\n"
        "What works: pad the batch, or pack it (values, and lengths for the attention kernel); or "
        "actckpt.optimize on modules that are given no nested tensors"
    )


def is_shell(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a shell around others, without memory of its own."""
    # not used directly, because its TypeGuard contradicts torch.Tensor's own signatures
    return bool(is_traceable_wrapper_subclass(tensor))


@cache
def is_shell_type(kind: type) -> bool:
    """Whether tensors of this class are shells around others, and dispatch by themselves."""
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a strided window on a storage of its own."""
    return tensor.layout == torch.strided and not is_shell(tensor)


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The strided tensors under a tensor: itself, or those of a shell or of a sparse tensor."""
    known: tuple[torch.Tensor, ...] | None = tensor.__dict__.get(PARTS)
    if known is not None:
        yield from known
    elif is_shell(tensor):
        names: Any = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        for name in names:
            part = getattr(tensor, name)
            if isinstance(part, torch.Tensor):  # a DTensor lists its mesh as well
                yield from parts(part)
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout == torch.strided:
        yield tensor


def made_of(fake: torch.Tensor, known: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """``fake``, whose parts these are."""
    fake.__dict__[PARTS] = known
    return fake


def with_parts(args: tuple[Any, ...], out: Any) -> Any:
    """``out`` of an operation on fakes; one that is sparse is as full as the sparse argument is.

    Compressed tensors are transposed by their other name; all others copy what they are made of.
    """
    if not isinstance(out, torch.Tensor) or out.layout not in SPARSE or PARTS in out.__dict__:
        return out
    source = next((a for a in args if isinstance(a, torch.Tensor) and PARTS in a.__dict__), None)
    if source is None:
        return out
    known: tuple[torch.Tensor, ...] = source.__dict__[PARTS]
    if source.layout == torch.sparse_coo:
        known = tuple(torch.empty_like(part) for part in known)
    return made_of(out, known)
