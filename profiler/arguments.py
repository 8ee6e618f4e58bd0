"""An operation's arguments made again from its signature: same shapes, strides, types, devices.

Integer tensors are zero, or where their bound is known spread below it: an index out of bounds can
end the process in a backward kernel. Boolean tensors are true. Floating tensors hold values in
[0.1, 1): variances and probabilities are legal, and repeated in-place steps stay away from
denormals for the few repeats that are made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from actckpt.tracing.signature import decode

_BLOCK = 1 << 16


# descriptors and scratch of a forward kernel: a backward kernel trusts them, and crashes on others
_KERNEL_OWNED = frozenset({"workspace", "reserve", "reservedSpace"})


class UnrunnableError(Exception):
    """The operation cannot be run alone from its signature; the message says why."""


def rebuild(
    signature: str, place: Callable[[torch.device], torch.device], *, fill: bool = True
) -> tuple[Any, list[Any], dict[str, Any]]:
    """(overload, args, kwargs) with tensors to call it on.

    Args:
        place: from the device in the signature to the device to use.
        fill: give floating tensors values; otherwise their memory stays untouched.

    Raises:
        UnrunnableError: an argument or the operation cannot be made here.
    """

    def make(
        shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        if len(stride) != len(shape):
            raise UnrunnableError("a tensor without strides")
        return strided(shape, stride, dtype, place(torch.device(device)), fill=fill)

    def sparse(
        shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str, nonzeros: int
    ) -> torch.Tensor:
        if len(shape) != 2 or layout not in ("sparse_coo", "sparse_csr", "sparse_csc"):
            raise UnrunnableError(f"a {layout} tensor of {len(shape)} dimensions")
        return _sparse(shape, dtype, place(torch.device(device)), layout, nonzeros)

    if '{"other":' in signature:
        raise UnrunnableError("an argument that is not data")
    try:
        op, args, kwargs = decode(signature, make, sparse)
    except AttributeError as error:
        raise UnrunnableError(str(error)) from error
    if op is torch.ops.aten.mkldnn_rnn_layer_backward.default:
        _run_lstm_forward(args)
    elif any(a.name in _KERNEL_OWNED for a in op._schema.arguments):
        raise UnrunnableError("an argument whose contents only the kernel's forward can write")
    args, kwargs = tree_map_only(torch.device, place, (args, kwargs))
    if "efficient_attention" in op.name():
        _seed_on_host(op, args)
    for index, bound in _indices(op.name().split("::")[-1].split(".")[0], args):
        if bound > 1 and not index.is_floating_point() and index.device.type != "meta":
            index.random_(0, bound)
    if "grouped_mm" in op.name():
        _spread_offsets(args, kwargs)
    return op, args, kwargs


def input_bytes(signature: str) -> int:
    """Bytes of the tensor arguments, without making them; windows count what they span."""
    total = 0
    stack = json.loads(signature)[1:]
    while stack:
        x = stack.pop()
        if isinstance(x, list):
            stack.extend(x)
        elif isinstance(x, dict) and "sparse" in x:
            width = torch.int64.itemsize * len(x["t"][0]) + getattr(torch, x["t"][2]).itemsize
            total += width * x["sparse"][1]
        elif isinstance(x, dict) and "t" in x:
            shape, stride, dtype, _ = x["t"]
            size = span(shape, stride) if len(shape) == len(stride) else math.prod(shape)
            total += size * getattr(torch, dtype).itemsize
        elif isinstance(x, dict):
            stack.extend(x.values())
    return total


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided window; 0 if it is empty."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def strided(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fill: bool = True,
) -> torch.Tensor:
    """A tensor of that layout on a storage of its own, with harmless values."""
    flat = torch.empty(span(shape, stride), dtype=dtype, device=device)
    if device.type != "meta":
        if dtype == torch.bool:
            flat.fill_(True)
        elif not dtype.is_floating_point and not dtype.is_complex:
            flat.zero_()
        elif fill:
            _fill(torch.view_as_real(flat).view(-1) if dtype.is_complex else flat)
    return flat.as_strided(shape, stride)


def _sparse(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str, nonzeros: int
) -> torch.Tensor:
    """A matrix with its numbers spread evenly over its rows."""
    values = torch.ones(nonzeros, dtype=dtype, device=device)
    made: torch.Tensor
    if layout == "sparse_coo":
        rows = torch.arange(nonzeros, device=device) * shape[0] // max(nonzeros, 1)
        columns = torch.randint(shape[1], (nonzeros,), device=device)
        indices = torch.stack([rows, columns])
        made = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
        return made._coalesced_(True)
    outer, inner = shape if layout == "sparse_csr" else shape[::-1]
    ends = torch.arange(outer + 1, device=device) * nonzeros // max(outer, 1)
    other = torch.randint(inner, (nonzeros,), device=device)
    make = torch.sparse_csr_tensor if layout == "sparse_csr" else torch.sparse_csc_tensor
    made = make(ends, other, values, shape, check_invariants=False)
    return made


def _fill(flat: torch.Tensor) -> None:
    # drawing numbers is slow: one block is drawn and repeated
    block = torch.rand(min(_BLOCK, flat.numel()), device=flat.device) * 0.9 + 0.1
    block = block.to(flat.dtype)
    whole = flat.numel() // _BLOCK * _BLOCK
    if whole:
        flat[:whole].view(-1, _BLOCK).copy_(block.expand(whole // _BLOCK, -1))
    flat[whole:].copy_(block[: flat.numel() - whole])


def _indices(name: str, args: list[Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Integer arguments of well-known operations, with the bound that their values stay below."""
    try:
        if name == "embedding":
            yield args[1], args[0].shape[0]
        elif name == "embedding_dense_backward":
            yield args[1], args[2]
        elif name in ("gather", "index_select", "index_add", "index_add_", "scatter_add_"):
            yield args[2], args[0].shape[args[1]]
        elif name in ("nll_loss_forward", "nll_loss2d_forward"):
            yield args[1], args[0].shape[1 if args[0].dim() > 1 else 0]
        elif name in ("nll_loss_backward", "nll_loss2d_backward"):
            yield args[2], args[1].shape[1 if args[1].dim() > 1 else 0]
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for dim, index in enumerate(args[1]):
                if index is not None and index.dtype in (torch.int32, torch.int64):
                    yield index, args[0].shape[dim]
    except (IndexError, AttributeError, TypeError):
        return  # other arguments than known: zeros are legal


def _run_lstm_forward(args: list[Any]) -> None:
    """Puts what oneDNN's forward returns, its workspace too, among its backward's arguments."""
    if args[0].device.type == "meta":
        return
    names = [a.name for a in torch.ops.aten.mkldnn_rnn_layer_backward.default._schema.arguments]
    given = dict(zip(names, args, strict=False))
    # it writes no workspace where gradients are disabled
    with torch.enable_grad():
        results = torch.ops.aten.mkldnn_rnn_layer(
            *args[:7],
            *(given[name] for name in ("reverse", "batch_sizes", "mode", "hidden_size")),
            *(given[name] for name in ("num_layers", "has_biases", "bidirectional")),
            *(given[name] for name in ("batch_first", "train")),
        )
    places = ("output", "hy_", "cy_", "workspace")
    for name, made in zip(places, results, strict=True):
        args[names.index(name)] = made


def _seed_on_host(op: Any, args: list[Any]) -> None:
    """Moves the random state to where CUDA's kernel reads it; its meta kernel says otherwise."""
    for i, (argument, x) in enumerate(zip(op._schema.arguments, args, strict=False)):
        if argument.name in ("philox_seed", "philox_offset") and x.device.type == "cuda":
            args[i] = x.cpu()


def _spread_offsets(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Equal groups for a grouped product; its offsets are the groups' ends along the rows."""
    for x in [*args, *kwargs.values()]:
        if isinstance(x, torch.Tensor) and x.dtype == torch.int32 and x.dim() == 1 and x.numel():
            rows = args[0].shape[-1] if args[1].dim() == 2 else args[0].shape[0]
            ends = [rows * (i + 1) // x.numel() for i in range(x.numel())]
            x.copy_(torch.tensor(ends, dtype=torch.int32))
