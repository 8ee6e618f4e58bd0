"""Plans for accelerators that are not here: without weights, priced, from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.cli import main
from actckpt.commands.targets import load_target
from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Category
from actckpt.planning.making import make_plan
from actckpt.planning.request import Planned, Request
from actckpt.tracing.tracer import trace_step
from actckpt.tracing.weightless import without_weights
from tests.accelerators import SMALL, load, step_for
from tests.test_cli import TARGET

ROOT = Path(__file__).parent.parent
SETTINGS = [f"--set={key}={value}" for key, value in SMALL["llama"].items()]

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
        assert fitting.plan.regions or fitting.plan.bursts
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
    assert "policy auto of LlamaForCausalLM on H100 SXM 80 GB, estimated (roofline)" in out
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
        planned("llama", "a100-40gb", "calls", 10**6)
    assert caught.value.smallest_bytes is not None
    assert caught.value.smallest_bytes > 10**6


# ---- at size

LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_billion_parameters_are_planned_in_half_a_gigabyte(tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    argv = [
        "plan", "llama", *(f"--set={k}={v}" for k, v in LLAMA_8B.items()), "--device", "h100-80gb",
        "--dtype", "bf16", "--batch-size", "2", "--seq-len", "4096", "--optimizer", "none",
        "--budget-gb", "70", "--save", str(saved),
    ]  # fmt: skip
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from actckpt.cli import main\n"
        f"assert main({argv!r}) == 0\n"
        # of this program alone: getrusage's also knows the process that began it
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "peak = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "print(peak * 1024, time.process_time(), file=sys.stderr)\n"
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
