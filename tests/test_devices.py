"""Plans for accelerators that are not here: their table, their operations, no weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from actckpt.cli import main
from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Category, Graph
from actckpt.planning import Planned, Request, make_plan
from actckpt.profile import Cost
from actckpt.profiler.build import build_profile
from actckpt.profiler.devices import DEVICES, Device, find_device, refuse_dtypes
from actckpt.profiler.roofline import estimate, machine_of
from actckpt.signature import encode
from actckpt.targets import load_target
from actckpt.tracing.accelerator_ops import AcceleratorOps
from actckpt.tracing.call import Call
from actckpt.tracing.fake import FakeWorld
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from actckpt.tracing.weightless import without_weights
from tests.test_cli import TARGET

CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
ROOT = Path(__file__).parent.parent
WANTED = (
    "a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "l4", "t4", "a10g", "rtx-3090",
    "rtx-4090", "mi300x",
)  # fmt: skip
SMALL = {
    "gpt2": {"n_layer": "3", "n_embd": "64", "n_head": "4", "vocab_size": "256"},
    "llama": {
        "num_hidden_layers": "3", "hidden_size": "64", "intermediate_size": "128",
        "num_attention_heads": "4", "num_key_value_heads": "2", "vocab_size": "256",
    },
    "vit": {
        "num_hidden_layers": "3", "hidden_size": "64", "num_attention_heads": "4",
        "intermediate_size": "128", "image_size": "64", "num_labels": "5",
    },
}  # fmt: skip
SETTINGS = [f"--set={key}={value}" for key, value in SMALL["llama"].items()]


def load(name: str, dtype: str | None = "bf16") -> tuple[nn.Module, Any]:
    return load_target(name, overrides=SMALL[name], batch_size=4, seq_len=128, dtype=dtype)


def step_for(device: str, batch: Any, model: nn.Module | None = None) -> Step:
    optimizer = torch.optim.AdamW(model.parameters()) if model is not None else None
    return Step(Call.of(batch), optimizer=optimizer, stand_in=DEVICES[device].stand_in)


def traced(name: str, device: str, dtype: str | None = "bf16") -> Graph:
    with without_weights():
        model, batch = load(name, dtype)
    return trace_step(model, step_for(device, batch))


def saved_bytes(graph: Graph) -> int:
    saved = {graph.values[s.value].storage for s in graph.saves if not s.held}
    return sum(graph.storages[sid].bytes for sid in saved if graph.storages[sid].born >= 0)


def names(graph: Graph) -> Counter[str]:
    return Counter(op.name.split(".")[1] for op in graph.ops)


# ---- the table


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


# ---- the operations


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


# ---- no weights


def test_nothing_of_size_is_allocated() -> None:
    before = torch.get_rng_state()
    with without_weights():
        model, batch = load_target(
            "gpt2", overrides={"n_layer": "2"}, batch_size=2, seq_len=64, dtype=None
        )
    assert torch.equal(torch.get_rng_state(), before)
    real = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    assert sum(t.nbytes for t in real) < 3e5
    assert sum(p.nbytes for p in model.parameters()) > 2e8
    assert not batch["input_ids"].is_meta


def test_small_tensors_have_their_values() -> None:
    with without_weights():
        mask = torch.ones(64, 64, dtype=torch.bool).tril()
        rates = [x.item() for x in torch.linspace(0, 0.1, 5)]
        large = torch.randn(1000, 1000)
        product = large @ torch.ones(1000, 3)
        copied = large.to(torch.bfloat16).clone()
    assert int(mask.sum()) == 64 * 65 // 2
    assert rates[-1] == pytest.approx(0.1)
    assert large.is_meta
    assert product.is_meta
    assert copied.is_meta


def test_weights_on_the_meta_device_trace_as_real_ones_do() -> None:
    with without_weights():
        shapes, batch = load("gpt2")
    real, _ = load("gpt2")
    kept = [(p, p._version) for p in shapes.parameters()]
    graphs = [trace_step(m, step_for("l4", batch, m)) for m in (shapes, real)]
    assert graphs[0] == graphs[1]
    assert all(
        p is q and p._version == v for p, (q, v) in zip(shapes.parameters(), kept, strict=True)
    )


# ---- plans


def planned(name: str, device: str, policy: str, budget_bytes: int | None = None) -> Planned:
    with without_weights():
        model, batch = load(name)
    return make_plan(model, step_for(device, batch, model), Request(budget_bytes, policy, "step"))


@pytest.mark.parametrize("name", SMALL)
def test_the_dry_run_sees_what_the_price_says(name: str) -> None:
    for policy in ("none", "full"):
        plan = planned(name, "a100-40gb", policy)
        assert plan.dry.peak_bytes == pytest.approx(plan.price.peak_bytes, rel=2e-3)
    least = plan.dry.peak_bytes
    budget = (plan.untouched.peak_bytes + least) // 2
    if budget > 1.02 * least:
        fitting = planned(name, "a100-40gb", "auto", budget)
        assert fitting.dry.peak_bytes <= budget
        assert fitting.plan.regions
    assert plan.profile.device == "A100 SXM 40 GB"
    assert {c.source for c in plan.profile.costs} == {"roofline"}


def test_states_of_generators_take_no_device_memory() -> None:
    plan = planned("gpt2", "a100-40gb", "full")
    assert not any(
        level % 512 for at in plan.dry.timeline for n, level in at.items() if n != "workspace"
    )
    optimizer = [s for s in plan.graph.storages if s.category is Category.OPTIMIZER]
    assert optimizer
    assert any("_foreach_" in op.name for op in plan.graph.ops)


# ---- the command line


def test_plan_for_a_device_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "llama", *SETTINGS, "--dtype", "bf16", "--batch-size", "4", "--seq-len", "128"]
    saved = tmp_path / "plan.json"
    status = main([*argv, "--device", "h100-80gb", "--budget-gb", "6MB", "--save", str(saved)])
    out = capsys.readouterr().out
    assert status == 0
    assert "for H100 SXM 80 GB, without weights" in out
    assert "policy auto on H100 SXM 80 GB, estimated (roofline)" in out
    assert "nothing was measured" in out
    assert "estimated" in json.loads(saved.read_text(encoding="utf-8"))["device"]


def test_without_a_budget_the_devices_memory_is_it(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "llama", *SETTINGS, "--dtype", "fp16", "--seq-len", "64", "--device", "t4"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "no --budget-gb: 14.2 GB assumed, the 16 GB of T4 less a reserve of 1.8 GB" in out
    assert "budget 14.2 GB" in out
    assert main([*argv, "--policy", "full"]) == 0
    assert "no budget" in capsys.readouterr().out


def test_a_function_of_ones_own_is_built_without_weights_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", TARGET, "--device", "mi300x", "--policy", "full"]) == 0
    assert "MI300X" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "h200", "--budget-gb", "200"], "more than the 141 GB that H200"),
        (["--device", "t4", "--dtype", "bf16"], "T4 has no bfloat16"),
        (["--device", "l4", "--scope", "activations"], "needs a budget"),
        (["--device", "l4", "--budget-gb", "1MB"], "smallest plan of policy 'auto'"),
        (["--device", "abacus"], r"no device 'abacus'.*h100-80gb"),
    ],
)
def test_bad_devices_and_budgets_are_one_message(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = main(["plan", "llama", *SETTINGS, "--seq-len", "64", *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert re.search(message, err.replace("\n", " "))
    assert "Traceback" not in err


def test_compare_measures_only_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", TARGET, "--device", "h100"]) == 2
    assert "actckpt plan" in capsys.readouterr().err


def test_budget_errors_keep_their_numbers() -> None:
    with pytest.raises(BudgetError) as caught:
        planned("llama", "a100-40gb", "auto", 10**6)
    assert caught.value.smallest_bytes is not None
    assert caught.value.smallest_bytes > 10**6


# ---- at size

LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}  # fmt: skip


def test_eight_billion_parameters_are_planned_in_half_a_gigabyte(tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    argv = [
        "plan", "llama", *(f"--set={k}={v}" for k, v in LLAMA_8B.items()), "--device", "h100-80gb",
        "--dtype", "bf16", "--batch-size", "2", "--seq-len", "4096", "--optimizer", "none",
        "--budget-gb", "70", "--save", str(saved),
    ]  # fmt: skip
    code = (
        "import resource, sys\n"
        "from actckpt.cli import main\n"
        f"assert main({argv!r}) == 0\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    resident_bytes, processor_s = map(float, done.stderr.splitlines()[-1].split())
    assert resident_bytes < 1e9
    assert processor_s < 60
    report = json.loads(saved.read_text(encoding="utf-8"))
    assert 8e10 < report["baseline"]["predicted"]["peak_bytes"] < 9e10
    assert 6.5e10 < report["planned"]["predicted"]["peak_bytes"] <= 7e10
    overhead = (
        report["planned"]["predicted"]["step_s"] / report["baseline"]["predicted"]["step_s"] - 1
    )
    assert 0 < overhead < 0.15
