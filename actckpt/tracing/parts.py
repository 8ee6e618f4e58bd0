"""The strided tensors that others are made of: wrapper subclasses and sparse tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip
# of a fake, which knows no sizes of what it is made of
_PARTS = "_actckpt_parts"


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
    known: tuple[torch.Tensor, ...] | None = tensor.__dict__.get(_PARTS)
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
    fake.__dict__[_PARTS] = known
    return fake
