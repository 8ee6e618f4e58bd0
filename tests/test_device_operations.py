"""Accelerators that are not here: the operations that they would run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from actckpt.errors import PlanError
from actckpt.graph import Graph
from actckpt.profiler.devices import DEVICES
from actckpt.tracing.accelerator_ops import AcceleratorOps
from actckpt.tracing.call import Call
from actckpt.tracing.fake import FakeWorld
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from tests.accelerators import (
    load,
    names,
    saved_bytes,
    step_for,
    traced,
)

CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def attention_ops(device: str, *args: Any, **kwargs: Any) -> set[str]:
    """Which attention kernels run forward and backward on fake tensors."""
    stand_in = DEVICES[device].stand_in
    world = FakeWorld(stand_in)
    seen: set[str] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.add(func.name().removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    tensors: list[Any] = [
        world.fake(a).requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a
        for a in args
    ]
    with world.mode, Watch(), AcceleratorOps(stand_in):  # type: ignore[no-untyped-call]
        out = functional.scaled_dot_product_attention(*tensors, **kwargs)
        out.sum().backward()
    shapes = [t.grad.shape == t.shape for t in tensors[:3] if t.grad is not None]
    assert shapes == [True] * 3
    assert out.shape == (*args[0].shape[:-1], args[2].shape[-1])
    return {name for name in seen if "scaled_dot_product" in name or "softmax" in name}


def qkv(heads: int = 4, of_keys: int = 4, size: int = 64, dtype: Any = torch.bfloat16) -> Any:
    shapes = ((2, heads, 40, size), (2, of_keys, 40, size), (2, of_keys, 40, size))
    return tuple(torch.empty(s, dtype=dtype, device="meta") for s in shapes)


KERNELS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("a100-40gb", qkv(), {"is_causal": True}, "flash"),
    ("a100-40gb", qkv(4, 2), {"is_causal": True, "enable_gqa": True}, "flash"),
    ("a100-40gb", qkv(size=60), {}, "flash"),
    ("a100-40gb", qkv(), {"dropout_p": 0.1}, "flash"),
    ("a100-40gb", qkv(dtype=torch.float32), {}, "efficient"),
    ("rtx-4090", qkv(size=200), {}, "efficient"),
    ("a100-40gb", qkv(size=200), {}, "flash"),
    ("h100-80gb", qkv(4, 2), {"is_causal": True, "enable_gqa": True}, "cudnn"),
    ("h100-80gb", qkv(), {"dropout_p": 0.1}, "flash"),
    ("h100-80gb", qkv(), {"dropout_p": 0.125}, "cudnn"),
    ("h100-80gb", qkv(size=160), {}, "flash"),
    ("mi300x", qkv(), {}, "flash"),
    ("t4", qkv(dtype=torch.float16), {"is_causal": True}, "efficient"),
    ("t4", qkv(4, 2, dtype=torch.float16), {"enable_gqa": True}, "math"),
    ("a100-40gb", qkv(dtype=torch.float64), {}, "math"),
]


@pytest.mark.parametrize(("device", "tensors", "kwargs", "kernel"), KERNELS)
def test_attention_runs_the_kernel_that_the_device_would_take(
    device: str, tensors: Any, kwargs: Any, kernel: str
) -> None:
    seen = attention_ops(device, *tensors, **kwargs)
    if kernel == "math":
        assert seen
        assert not any("scaled_dot_product" in name for name in seen)
    else:
        name = f"_scaled_dot_product_{kernel}_attention"
        assert seen == {name, f"{name}_backward"}


@pytest.mark.parametrize("length", [40, 48])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_a_mask_rules_flash_attention_out(length: int, dtype: torch.dtype) -> None:
    tensors = tuple(
        torch.empty(2, 4, length, 64, dtype=torch.bfloat16, device="meta") for _ in "qkv"
    )
    mask = torch.empty(2, 1, length, length, dtype=dtype, device="meta")
    seen = attention_ops("a100-40gb", *tensors, attn_mask=None)
    assert "_scaled_dot_product_flash_attention" in seen
    seen = attention_ops("a100-40gb", *tensors, mask)
    assert "_scaled_dot_product_efficient_attention" in seen


@pytest.mark.parametrize(
    ("name", "device", "kernel"),
    [
        ("gpt2", "a100-80gb", "flash"),
        ("llama", "h100-80gb", "cudnn"),
        ("vit", "rtx-3090", "flash"),
    ],
)
def test_a_model_runs_the_accelerators_operations(name: str, device: str, kernel: str) -> None:
    graph = traced(name, device)
    model, batch = load(name)
    here = trace_step(model, Step(Call.of(batch)))
    found, on_cpu = names(graph), names(here)
    assert found[f"_scaled_dot_product_{kernel}_attention"] == 3
    assert found[f"_scaled_dot_product_{kernel}_attention_backward"] == 3
    # the CPU's kernel draws no dropout
    assert on_cpu["_safe_softmax" if name == "gpt2" else CPU_ATTENTION] == 3
    assert not any("for_cpu" in n for n in found)
    if name == "gpt2":
        assert found["native_dropout"] == found["native_dropout_backward"] == 7
        assert on_cpu["bernoulli_"] == 10  # three of them in attention
        assert not found["bernoulli_"]
        masks = [
            graph.values[v]
            for op in graph.ops
            if op.name == "aten.native_dropout.default"
            for v in op.outputs[1:]
        ]
        assert {m.dtype for m in masks} == {"bool"}
    assert saved_bytes(graph) != saved_bytes(here)
    assert graph.stands_for == DEVICES[device].name
    assert here.stands_for == ""
    assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


def test_sizes_are_those_of_the_accelerators_allocator() -> None:
    graph = traced("gpt2", "a100-80gb")
    assert {s.bytes % 512 for s in graph.storages} == {0}
    norms = [op for op in graph.ops if op.name == "aten.native_layer_norm.default"]
    kept = {graph.values[v].dtype for op in norms for v in op.outputs[1:]}
    assert kept == {"float32"}


def test_half_precision_softmax_does_not_convert_first() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(64, 64, dtype=torch.float16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = functional.softmax(x @ self.weight, dim=-1, dtype=torch.float32)
            return functional.dropout(scores, 0.5, self.training).sum()

    graph = trace_step(Scores(), step_for("t4", torch.empty(64, 64, dtype=torch.float16)))
    assert names(graph)["_softmax"] == names(graph)["native_dropout"] == 1
    assert not names(graph)["_to_copy"]


def test_attention_inside_torchs_own_layers_is_seen() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
    step = Step(
        Call(torch.empty(4, 32, 64)),
        loss_fn=lambda out: out.mean(),
        stand_in=DEVICES["a100-40gb"].stand_in,
    )
    found = names(trace_step(layer, step))
    assert found["_scaled_dot_product_efficient_attention"] == 1
    assert found["native_dropout"] == 3
    assert not found["bernoulli_"]


def test_recurrent_layers_are_refused() -> None:
    step = step_for("l4", torch.empty(4, 8, 16))
    with pytest.raises(PlanError, match=r"lstm.*cuDNN on L4"):
        trace_step(nn.LSTM(16, 16), step)
