"""Cost estimated from bytes moved and floating-point operations, where nothing can be measured.

References: S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from actckpt.data.profile import Cost
from actckpt.profiler.arguments import input_bytes, rebuild, span
from actckpt.profiler.devices import BANDWIDTH_SHARE, FLOPS_SHARE, Device
from actckpt.profiler.timing import dispatch_seconds, is_view

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# fused attention, whose softmax runs beside the products, against what large products reach:
# about 0.7 forward and backward on Ampere (Dao, "FlashAttention-2", 2023), less on Hopper
_ATTENTION_SHARE = 0.7
# a view that its schema does not admit
_UNSAFE_VIEW = '["aten._unsafe_view.default"'
# what a dispatch mode takes of the processor beside an accelerator, as measured on servers' cores
_HOST_DISPATCH_S = 7e-6
# products in float32 that PyTorch hands to tensor cores by default: cuDNN's, not cuBLAS's
_CONVOLUTIONS = ("aten.convolution.default", "aten.convolution_backward.default")


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that operations reach on a device.

    Attributes:
        name: of the device.
        flops: FLOP/s by dtype name; others run at the rate of float32. "tfloat32" is float32 where
            it may run on tensor cores.
        bandwidth: bytes/s to and from memory.
        launch_s: least seconds of any operation.
        dispatch_s: seconds that a dispatch mode adds to an operation.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    launch_s: float
    dispatch_s: float = 20e-6

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `Machine.from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Machine:
        """The machine that `to_json` wrote."""
        return cls(**data)


def machine_of(device: Device) -> Machine:
    """The rates that programs reach on a device of the table."""
    flops = {dtype: rate * FLOPS_SHARE for dtype, rate in device.flops.items()}
    return Machine(
        device.name, flops, device.bandwidth * BANDWIDTH_SHARE, device.launch_s, _HOST_DISPATCH_S
    )


def calibrate(device: torch.device, name: str) -> Machine:
    """The rates of a device at hand, from a few small products and copies (under a second)."""
    size = 512 if device.type == "cpu" else 4096
    flops = {}
    for dtype in _DTYPES:
        a = torch.ones(size, size, dtype=dtype, device=device)
        flops[str(dtype)[6:]] = 2 * size**3 / _best(lambda a=a: a @ a, device)
    a = torch.ones(1 << 23, device=device)  # 32 MiB, beyond most caches
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / _best(lambda: b.copy_(a), device)
    tiny = torch.ones(1, device=device)
    launch = _best(lambda: tiny.add_(0), device, runs=100)
    return Machine(name, flops, bandwidth, launch, dispatch_seconds(device))


def estimate(signature: str, machine: Machine) -> Cost:
    """Bytes over bandwidth or FLOPs over peak, whichever is longer, and at least one launch.

    Outputs and FLOPs are known where the operation runs on meta tensors and torch counts it; else
    only the bytes of its inputs. Causal attention does half of the work of a full one.
    """
    if is_view(signature) or signature.startswith(_UNSAFE_VIEW):
        return Cost(machine.launch_s, 0, "roofline")
    moved = input_bytes(signature)
    flops = 0.0
    scratch = 0
    rate = machine.flops["float32"]
    try:
        op, args, kwargs, out = _on_meta(signature)
    except Exception:  # unknown arguments, no meta kernel, data-dependent shapes
        pass
    else:
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        moved = _moved(op, ins, outs)
        flops = _flops(op, args, kwargs, out)
        rate = _rate(op, ins, machine)
        scratch = scratch_bytes(op, args)
    time_s = max(moved / machine.bandwidth, flops / rate, machine.launch_s)
    return Cost(time_s, scratch, "roofline")


def output_bytes(signature: str) -> int:
    """Bytes of the operation's outputs, 0 where it does not run on meta tensors."""
    try:
        out = _on_meta(signature)[3]
    except Exception:  # unknown arguments, no meta kernel, data-dependent shapes
        return 0
    return _bytes(x for x in tree_leaves(out) if isinstance(x, torch.Tensor))


def _on_meta(signature: str) -> tuple[Any, list[Any], dict[str, Any], Any]:
    op, args, kwargs = rebuild(signature, lambda _: torch.device("meta"), fill=False)
    return op, args, kwargs, op(*args, **kwargs)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _moved(op: Any, ins: list[torch.Tensor], outs: list[torch.Tensor]) -> int:
    """Bytes read and written; windows count what they span."""
    read = sum(span(tuple(x.shape), x.stride()) * x.element_size() for x in ins)
    if op is torch.ops.aten.embedding.default:  # reads the rows that it returns, not the table
        read = _bytes([ins[1], *outs])
    if not outs and op._schema.is_mutable:  # lists updated in place
        return 2 * read
    return read + _bytes(outs)


def _rate(op: Any, ins: list[torch.Tensor], machine: Machine) -> float:
    dtype = str(ins[0].dtype)[6:] if ins else "float32"
    tensor_cores = str(op) in _CONVOLUTIONS or torch.get_float32_matmul_precision() != "highest"
    if dtype == "float32" and tensor_cores and "tfloat32" in machine.flops:
        dtype = "tfloat32"
    rate = machine.flops.get(dtype, machine.flops["float32"])
    if _attention(op):
        rate *= _ATTENTION_SHARE
    return rate


def _attention(op: Any) -> bool:
    return op.name().startswith("aten::_scaled_dot_product") and "math" not in op.name()


def scratch_bytes(op: Any, args: Sequence[Any]) -> int:
    """What a kernel is known to allocate beside its results; most of it is not known.

    Flash attention's backward sums the query's gradient in float32, and the key's and value's per
    query head where heads are grouped; the other fused kernels do about the same.
    """
    if not (_attention(op) and op.name().endswith("_backward")) or "for_cpu" in op.name():
        return 0
    query, key, value = args[1:4]
    batch, heads, length, size = query.shape
    scratch = batch * heads * (-(-length // 128) * 128) * (-(-size // 32) * 32 + 1) * 4
    if key.shape[1] != heads:
        scratch += _bytes((key, value)) * heads // key.shape[1]
    return int(scratch)


def _flops(op: Any, args: Any, kwargs: Any, out: Any) -> float:
    if _attention(op):
        return _attention_flops(op, args)
    count = flop_registry.get(op.overloadpacket)
    if count is None:
        return 0.0
    try:
        return float(count(*args, **kwargs, out_val=out))
    except (TypeError, AssertionError, ValueError, IndexError):
        return 0.0  # arguments that torch's formula does not expect


def _attention_flops(op: Any, args: Sequence[Any]) -> float:
    """Of two products forward and five backward; torch's formulas know neither causal nor all."""
    backward = "_backward" in op.name()
    query, key, value = args[1:4] if backward else args[:3]
    names = [a.name for a in op._schema.arguments]
    at = names.index("is_causal")
    causal = at < len(args) and bool(args[at])
    pairs = math.prod(query.shape[:-1]) * key.shape[-2] / (2 if causal else 1)
    sizes = query.shape[-1] + value.shape[-1]
    return float(2 * pairs * sizes * (2.5 if backward else 1))


def _best(call: Any, device: torch.device, runs: int = 12) -> float:
    best = math.inf
    for _ in range(runs + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best
