"""Cost estimated from bytes moved and floating-point operations, where nothing can be measured.

References: S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from actckpt.profile import Cost
from actckpt.profiler.arguments import input_bytes, rebuild
from actckpt.profiler.timing import dispatch_seconds, is_view

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Machine:
    """Peak rates of a device.

    Attributes:
        name: of the device.
        flops: FLOP/s by dtype name; others run at the rate of float32.
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


def _gpu(name: str, fp32: float, half: float, bandwidth: float) -> Machine:
    flops = {"float32": fp32, "bfloat16": half, "float16": half}
    return Machine(name, flops, bandwidth, 5e-6)


# dense tensor-core rates for half precision, plain float32, memory bandwidth; vendors' data sheets
MACHINES: dict[str, Machine] = {
    "v100": _gpu("V100", 15.7e12, 125e12, 0.9e12),
    "a100": _gpu("A100", 19.5e12, 312e12, 2.0e12),
    "a10": _gpu("A10", 31.2e12, 125e12, 0.6e12),
    "l4": _gpu("L4", 30.3e12, 121e12, 0.3e12),
    "l40": _gpu("L40", 90.5e12, 181e12, 0.864e12),
    "rtx 3090": _gpu("RTX 3090", 35.6e12, 71e12, 0.936e12),
    "rtx 4090": _gpu("RTX 4090", 82.6e12, 165e12, 1.008e12),
    "h100": _gpu("H100", 67e12, 989e12, 3.35e12),
    "h200": _gpu("H200", 67e12, 989e12, 4.8e12),
    "b200": _gpu("B200", 75e12, 2250e12, 8.0e12),
}


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
    only the bytes of its inputs.
    """
    if is_view(signature):
        return Cost(machine.launch_s, 0, "roofline")
    moved = input_bytes(signature)
    flops = 0.0
    rate = machine.flops["float32"]
    try:
        op, args, kwargs, out = _on_meta(signature)
    except Exception:  # unknown arguments, no meta kernel, data-dependent shapes
        pass
    else:
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        moved += _bytes(outs)
        flops = _flops(op, args, kwargs, out)
        rate = machine.flops.get(str(ins[0].dtype)[6:], rate) if ins else rate
    return Cost(max(moved / machine.bandwidth, flops / rate, machine.launch_s), 0, "roofline")


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


def _flops(op: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = op.overloadpacket
    count = flop_registry.get(packet)
    try:
        if count is not None:
            return float(count(*args, **kwargs, out_val=out))
        # the CPU's own attention is missing from the registry
        name = op.name()
        if "scaled_dot_product_flash_attention_for_cpu_backward" in name:
            return float(sdpa_backward_flop(*args[:4]))
        if "scaled_dot_product_flash_attention_for_cpu" in name:
            return float(sdpa_flop(*args[:3]))
    except (TypeError, AssertionError, ValueError, IndexError):
        return 0.0  # arguments that torch's formula does not expect
    return 0.0


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
