"""Accelerators that are not here: the operations that they would run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from actckpt.data.graph import Category, Graph
from actckpt.errors import PlanError
from actckpt.interpreting.recomputation import moved_statistics
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
from tests.suite import CASES, loss_of

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


class Normalized(nn.Module):
    def __init__(self, norm: nn.Module, *sizes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(sizes))
        self.norm = norm

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(x * self.scale.to(x.dtype)).float().square().mean()


IMAGES = (2, 4, 6, 6)
NORMALIZED: list[tuple[str, nn.Module, tuple[int, ...], torch.dtype, bool]] = [
    ("h100-80gb", nn.BatchNorm2d(4), IMAGES, torch.float32, True),
    ("t4", nn.BatchNorm1d(4), (2, 4, 6), torch.float32, True),
    ("h100-80gb", nn.BatchNorm2d(4), IMAGES, torch.float16, True),
    ("h100-80gb", nn.BatchNorm2d(4, track_running_stats=False), IMAGES, torch.float32, True),
    ("h100-80gb", nn.BatchNorm2d(4), IMAGES, torch.bfloat16, False),
    ("h100-80gb", nn.BatchNorm2d(4).half(), IMAGES, torch.float16, False),
    ("h100-80gb", nn.BatchNorm2d(4, affine=False), IMAGES, torch.float32, False),
    ("h100-80gb", nn.BatchNorm1d(4), (6, 4), torch.float32, False),
    ("mi300x", nn.BatchNorm2d(4), IMAGES, torch.float32, False),
]


@pytest.mark.parametrize(("device", "norm", "sizes", "dtype", "in_cudnn"), NORMALIZED)
def test_batch_normalization_runs_in_cudnn_where_the_device_would(
    device: str, norm: nn.Module, sizes: tuple[int, ...], dtype: torch.dtype, in_cudnn: bool
) -> None:
    model = Normalized(norm, *sizes)
    graph = trace_step(model, step_for(device, torch.empty(sizes, dtype=dtype)))
    found = names(graph)
    kernel, other = ("cudnn", "native") if in_cudnn else ("native", "cudnn")
    assert found[f"{kernel}_batch_norm"] == found[f"{kernel}_batch_norm_backward"] == 1
    assert not found[f"{other}_batch_norm"]


def test_frozen_statistics_of_many_rows_are_not_cudnns() -> None:
    for rows, kernel in ((65_535, "cudnn"), (65_536, "native")):
        model = Normalized(nn.BatchNorm1d(2).eval(), rows, 2, 2)
        graph = trace_step(model, step_for("l4", torch.empty(rows, 2, 2)))
        (op,) = (op for op in graph.ops if op.name == f"aten.{kernel}_batch_norm.default")
        assert not op.writes
        assert not moved_statistics(op)


@pytest.mark.parametrize("device", ["h100-80gb", "mi300x"])
@pytest.mark.parametrize("name", ["resnet", "unet", "densenet"])
def test_statistics_that_are_moved_are_written_down(name: str, device: str) -> None:
    case = CASES[name]
    model = case.build()
    step = Step(
        Call.of(case.batch()),
        loss_fn=lambda output: loss_of(case, output),
        stand_in=DEVICES[device].stand_in,
    )
    graph = trace_step(model, step)
    norms = [op for op in graph.ops if op.name.endswith("_batch_norm.default")]
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(layers) > 0
    kernel = "cudnn" if device == "h100-80gb" else "native"
    assert {op.name for op in norms} == {f"aten.{kernel}_batch_norm.default"}
    moved = [sid for op in norms for sid in op.writes]
    assert len(set(moved)) == len(moved) == 2 * len(layers)
    assert {graph.storages[sid].category for sid in moved} == {Category.BUFFER}
    assert all(moved_statistics(op) == (3, 4) for op in norms)


def test_recurrent_layers_are_refused() -> None:
    step = step_for("l4", torch.empty(4, 8, 16))
    with pytest.raises(PlanError, match=r"lstm.*cuDNN on L4"):
        trace_step(nn.LSTM(16, 16), step)
