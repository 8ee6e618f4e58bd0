"""Accelerators that are not here: their table, and what an operation costs on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actckpt.commands.targets import load_target
from actckpt.data.profile import Cost
from actckpt.errors import PlanError
from actckpt.profiler.build import build_profile
from actckpt.profiler.devices import DEVICES, Device, find_device, refuse_dtypes
from actckpt.profiler.roofline import estimate, machine_of
from actckpt.tracing.signature import encode
from actckpt.tracing.tracer import trace_step
from actckpt.tracing.weightless import without_weights
from tests.accelerators import SMALL, load, step_for

WANTED = (
    "a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "l4", "t4", "a10g", "rtx-3090",
    "rtx-4090", "mi300x",
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_every_entry_is_complete(device: Device) -> None:
    flops = device.flops
    assert flops["float16"] >= flops["float32"] > 1e12
    assert flops.get("bfloat16", flops["float16"]) == flops["float16"]
    assert flops["float16"] >= flops.get("tfloat32", 0) >= flops["float32"] * ("tfloat32" in flops)
    assert 1e11 < device.bandwidth < 1e13
    assert 15e9 < device.capacity_bytes < 200e9
    assert 0 < device.launch_s < 1e-4
    assert 0 < device.default_budget_bytes < device.capacity_bytes
    # a newer half-precision unit came with bfloat16
    assert ("bfloat16" in flops) == (device.capability >= (8, 0))
    machine = machine_of(device)
    assert machine.flops["float32"] < flops["float32"]
    assert machine.bandwidth < device.bandwidth
    assert find_device(device.name) is device


def test_the_table_has_what_people_train_on() -> None:
    assert set(WANTED) <= set(DEVICES)
    assert find_device("H100") is find_device("h100_80GB") is DEVICES["h100-80gb"]
    assert find_device("RTX 3090") is DEVICES["rtx-3090"]
    assert find_device("cuda") is None
    rates = [DEVICES[n].flops["float16"] for n in ("t4", "a100-80gb", "h100-80gb", "b200")]
    assert rates == sorted(rates)


def test_a_dtype_that_a_device_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"T4 has no bfloat16 .* fp16"):
        refuse_dtypes(DEVICES["t4"], {"bfloat16": "head.weight"})
    refuse_dtypes(DEVICES["l4"], {"bfloat16": "head.weight", "float32": "norm.weight"})


# ---- what an operation costs


def cost(device: str, name: str, *args: Any) -> Cost:
    return estimate(encode(name, args, {}), machine_of(DEVICES[device]))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_attention_costs_its_products_half_of_them_where_causal() -> None:
    q, kv = meta(2, 8, 4096, 128), meta(2, 2, 4096, 128)
    flash = "aten._scaled_dot_product_flash_attention.default"
    full = cost("a100-80gb", flash, q, kv, kv, 0.0, False, False)
    causal = cost("a100-80gb", flash, q, kv, kv, 0.0, True, False)
    product = cost("a100-80gb", "aten.bmm.default", meta(16, 4096, 128), meta(16, 128, 4096))
    assert full.time_s == pytest.approx(2 * causal.time_s)
    assert 2 * product.time_s < full.time_s < 4 * product.time_s
    lse, seed = meta(2, 8, 4096, dtype=torch.float32), meta(2, dtype=torch.uint64)
    back = cost(
        "a100-80gb", flash.replace("attention.", "attention_backward."),
        q, q, kv, kv, q, lse, None, None, 4096, 4096, 0.0, True, seed, seed,
    )  # fmt: skip
    assert back.time_s == pytest.approx(2.5 * causal.time_s)
    # the sum of the query's gradient is in float32
    assert back.workspace_bytes > 2 * q.nbytes


def test_float32_uses_tensor_cores_in_convolutions_only() -> None:
    x, w = meta(64, 256, 56, 56, dtype=torch.float32), meta(256, 256, 3, 3, dtype=torch.float32)
    conv = ("aten.convolution.default", x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    slow, fast = cost("v100-32gb", *conv).time_s, cost("a100-40gb", *conv).time_s
    assert fast < slow / 5
    square = meta(8192, 8192, dtype=torch.float32)
    product = cost("a100-40gb", "aten.mm.default", square, square).time_s
    assert product == pytest.approx(2 * 8192**3 / machine_of(DEVICES["a100-40gb"]).flops["float32"])


def test_the_host_is_seen_only_where_the_device_waits_for_it() -> None:
    with without_weights():
        small = load("llama")
        large = load_target(
            "llama",
            overrides=SMALL["llama"] | {"hidden_size": "4096", "intermediate_size": "14336"},
            batch_size=4,
            seq_len=2048,
            dtype="bf16",
        )
    seen = [
        build_profile(trace_step(model, step_for("a100-80gb", batch))).dispatch_s
        for model, batch in (small, large)
    ]
    assert seen[1] < 0.5 * seen[0]


def test_an_embedding_reads_the_rows_that_it_returns() -> None:
    ids = meta(2, 64, dtype=torch.int64)
    small = cost("t4", "aten.embedding.default", meta(1_000_000, 4096), ids)
    assert small.time_s < 1e-4
