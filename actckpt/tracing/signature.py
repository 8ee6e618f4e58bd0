"""An operation with its arguments' shapes as one line of JSON, and back: the key of the profile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip
# of a fake, which knows no sizes of what it is made of: fakes of its parts
PARTS = "_actckpt_parts"


def encode(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """``[name, args, kwargs]`` as JSON; tensors become shape, stride, dtype and device.

    Args:
        name: full name of the overload, such as ``aten.addmm.default``.
    """
    return json.dumps(
        [name, [_encode(a) for a in args], {k: _encode(v) for k, v in kwargs.items()}],
        separators=(",", ":"),
    )


def described(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """As `encode`, but for the strides of dimensions of size 1, which mean nothing.

    Kernels set them as they like, and fake kernels otherwise than real ones.
    """
    found = json.loads(encode(name, args, kwargs))
    _settle(found[1:])
    return json.dumps(found, separators=(",", ":"))


def settled(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The strides, 0 where there is nothing to step over."""
    if 0 in shape:
        return (0,) * len(stride)
    return tuple(step if n > 1 else 0 for n, step in zip(shape, stride, strict=True))


def _settle(x: Any) -> None:
    """Settles the strides of every encoded tensor in place."""
    if isinstance(x, dict):
        if "t" in x:
            shape, stride, *_ = x["t"]
            if len(shape) == len(stride):
                x["t"][1] = list(settled(shape, stride))
        else:
            for value in x.values():
                _settle(value)
    elif isinstance(x, list):
        for value in x:
            _settle(value)


def decode(
    signature: str,
    make: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype, str], Any],
    sparse: Callable[[tuple[int, ...], torch.dtype, str, str, int], Any] | None = None,
) -> tuple[Any, list[Any], dict[str, Any]]:
    """(overload, args, kwargs) of a signature, with ``make(shape, stride, dtype, device)`` tensors.

    Args:
        sparse: makes sparse ones, ``sparse(shape, dtype, device, layout, nonzeros)``; None: as all.

    Raises:
        AttributeError: the operation does not exist in this torch.
    """
    name, args, kwargs = json.loads(signature)
    return (
        overload(name),
        [_decode(a, make, sparse) for a in args],
        {k: _decode(v, make, sparse) for k, v in kwargs.items()},
    )


def overload(name: str) -> Any:
    """The ``torch.ops`` overload of that name."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _encode(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        # jagged and sparse layouts have no strides: the profiler falls back to the roofline there
        stride = list(x.stride()) if x.layout == torch.strided else []
        # a ragged dimension's size is a symbol of its own in every batch
        shape = [n if isinstance(n, int) else "*" for n in x.shape]
        encoded: dict[str, Any] = {"t": [shape, stride, str(x.dtype)[6:], str(x.device)]}
        if x.layout in SPARSE:
            encoded["sparse"] = [str(x.layout)[6:], _nonzeros(x)]
        return encoded
    if isinstance(x, (list, tuple)):
        return [_encode(i) for i in x]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(x)[6:]}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, slice):
        return {"slice": [_encode(x.start), _encode(x.stop), _encode(x.step)]}
    if x is Ellipsis:
        return {"ellipsis": None}
    return {"other": type(x).__name__}


def _nonzeros(x: torch.Tensor) -> int:
    known = x.__dict__.get(PARTS)
    return int(known[-1].shape[0] if known is not None else x._nnz())


def _decode(x: Any, make: Callable[..., Any], sparse: Callable[..., Any] | None) -> Any:
    if isinstance(x, list):
        return [_decode(i, make, sparse) for i in x]
    if isinstance(x, dict):
        if "t" in x:
            shape, stride, dtype, device = x["t"]
            if "sparse" in x and sparse is not None:
                return sparse(tuple(shape), getattr(torch, dtype), device, *x["sparse"])
            return make(tuple(shape), tuple(stride), getattr(torch, dtype), device)
        if "torch" in x:
            return getattr(torch, x["torch"])
        if "device" in x:
            return torch.device(x["device"])
        return None
    return x
