"""Results whose size or layout fake kernels get wrong, as the real kernels make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from actckpt.tracing.layouts import laid_out, suggested
from actckpt.tracing.signature import decode, encode

aten = torch.ops.aten

# position of the weight among the arguments
_NORMS = {
    aten.native_layer_norm.default: 2,
    aten.native_group_norm.default: 1,
    aten.native_batch_norm.default: 1,
    aten._native_batch_norm_legit.default: 1,
    aten._native_batch_norm_legit_functional.default: 1,
}
_WORKSPACE = 3


# an accelerator keeps their statistics in float32 whatever the weight is
_FLOAT32_STATISTICS = {op for op in _NORMS if op is not aten.native_group_norm.default}


def fake_outputs(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, accelerated: bool = False
) -> Any:
    """What ``func`` returns on fake tensors, where there must be a kernel, as real ones do.

    Args:
        accelerated: the fake CPU tensors stand for an accelerator's.
    """
    own = _INSTEAD.get(func)
    if own is not None:
        return own(*args, **kwargs)
    out = corrected(func, args, kwargs, func(*args, **kwargs), accelerated=accelerated)
    return laid_out(func, args, kwargs, out, accelerated=accelerated)


def _grouped_product(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What groups of rows, of columns, or of what is summed over make of two matrices."""
    size = [a.shape[-2], b.shape[-1]]
    if a.dim() == b.dim():
        groups = a.shape[0] if a.dim() == 3 else 0 if offs is None else offs.shape[0]
        size.insert(0, groups)
    dtype = out_dtype or a.dtype
    # rows begin at multiples of 16 bytes
    aligned = 16 // dtype.itemsize
    row = -(-size[-1] // aligned) * aligned
    strides = (size[-2] * row, row, 1)[-len(size) :]
    return torch.empty_strided(size, strides, dtype=dtype, device=a.device)


def _group_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    n: int,
    c: int,
    hxw: int,
    group: int,
    mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of an image, laid out as it, and of weight and bias."""
    like = x if weight is None else weight
    shapes = ((tuple(x.shape), suggested(x), x.dtype), ((c,), (1,), like.dtype))
    return tuple(
        torch.empty_strided(*shape[:2], dtype=shape[2], device=x.device) if wanted else None
        for wanted, shape in zip(mask, (shapes[0], shapes[1], shapes[1]), strict=True)
    )


# where the fake kernel takes bfloat16 only and does not align its rows, or is made of views that
# some images do not have
_INSTEAD: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_product,
    aten.native_group_norm_backward.default: _group_norm_backward,
}


# reduced in place of their elements: what holds the scalar is as large as these were
_OF_ELEMENTS = {
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
}


def _on_its_elements(scalar: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
    """A reduced loss in the storage of its elements."""
    elements = torch.broadcast_shapes(*(t.shape for t in args[:2]))
    return torch.empty(elements, dtype=scalar.dtype, device=scalar.device).as_strided((), ())


def corrected(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, *, accelerated: bool = False
) -> Any:
    """What ``func`` returned on fake tensors, with the sizes that the CPU's kernels return.

    oneDNN's LSTM hands its backward a workspace, several times as large as its output, whose size
    only oneDNN knows; normalisations of reduced precision with float32 weights keep float32
    statistics; oneDNN's two bias gradients are tensors of their own; some losses keep the memory
    of their elements for the one number that is left of them.

    Args:
        accelerated: the fake CPU tensors stand for an accelerator's.
    """
    if func in _OF_ELEMENTS and out.dim() == 0:
        return _on_its_elements(out, args)
    if func is aten.mkldnn_rnn_layer.default:
        size = _workspace_bytes(encode(str(func), args, kwargs))
        workspace = torch.empty(size, dtype=torch.uint8, device=out[_WORKSPACE].device)
        return (*out[:_WORKSPACE], workspace)
    if func is aten.mkldnn_rnn_layer_backward.default:
        return (*out[:4], torch.empty_like(out[4]), *out[5:])
    if func in _NORMS and out[0].device.type == "cpu":
        weight = args[_NORMS[func]]
        dtype = weight.dtype if weight is not None else args[0].dtype
        if accelerated and func in _FLOAT32_STATISTICS and dtype.itemsize < 4:
            dtype = torch.float32
        if dtype != args[0].dtype:
            statistics = (torch.empty_like(t, dtype=dtype) for t in out[1:3])
            return (out[0], *statistics, *out[3:])
    return out


@cache
def _workspace_bytes(signature: str) -> int:
    """The size that the real operation chooses, by running it once on zeros of these shapes."""

    def make(
        shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()

    # it returns no workspace where gradients are disabled
    with _disable_current_modes(), torch.enable_grad():
        op, args, kwargs = decode(signature, make)
        return int(op(*args, **kwargs)[_WORKSPACE].untyped_storage().nbytes())
