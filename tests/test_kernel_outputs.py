"""Where torch's fake kernels refuse or are wrong, ours return what the real ones do."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import actckpt
from actckpt.profiler.build import build_profile
from actckpt.tracing.kernel_outputs import fake_outputs

GROUPED = torch.ops.aten._grouped_mm.default
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def operands(kind: str, wide: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Two matrices, or stacks of four, in groups of four rows of what has them."""
    offsets = (torch.arange(1, 5, dtype=torch.int32) * 4,)
    tall = torch.ones(16, 32, dtype=dtype)
    # columns that lie together may be of any number
    stack = torch.ones(4, wide, 32, dtype=dtype).transpose(1, 2)
    if kind == "rows":
        return (tall, stack, *offsets)
    if kind == "summed":
        return (tall.t(), torch.ones(16, -(-wide // 8) * 8, dtype=dtype), *offsets)
    return (torch.ones(4, 16, 32, dtype=dtype), stack)


@pytest.mark.parametrize(
    ("kind", "wide", "dtype"), list(product(("rows", "summed", "stacks"), (20, 21, 26), FLOATS))
)
def test_grouped_products_are_laid_out_as_they_are(
    kind: str, wide: int, dtype: torch.dtype
) -> None:
    given = operands(kind, wide, dtype)
    real = GROUPED(*given)
    with FakeTensorMode() as mode:
        fake = fake_outputs(GROUPED, tuple(mode.from_tensor(t) for t in given), {})
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert fake.stride() == real.stride()
    assert fake.untyped_storage().nbytes() == real.untyped_storage().nbytes()


def test_a_mixture_of_experts_in_float32() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    plain = transformers.MixtralForCausalLM(config)
    planned = copy.deepcopy(plain)
    tokens = torch.randint(64, (2, 32))
    graph = actckpt.trace(
        planned, {"input_ids": tokens, "labels": tokens}, loss_fn=lambda out: out.loss
    )
    profile = build_profile(graph, progress=False)
    peak_bytes = actckpt.price(graph, profile, actckpt.Plan("none")).peak_bytes
    actckpt.optimize(planned, budget_gb=0.93 * peak_bytes / 1e9)
    for model in (plain, planned):
        model(input_ids=tokens, labels=tokens).loss.backward()
    report = actckpt.report(planned)
    assert report.plan is not None
    assert report.plan.bursts or report.plan.regions
    for (name, p), q in zip(plain.named_parameters(), planned.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


LOSSES = {
    "mse_loss": torch.nn.functional.mse_loss,
    "smooth_l1_loss": torch.nn.functional.smooth_l1_loss,
    "soft_margin_loss": torch.nn.functional.soft_margin_loss,
    "binary_cross_entropy": torch.nn.functional.binary_cross_entropy,
    "l1_loss": torch.nn.functional.l1_loss,
}


@pytest.mark.kind("a loss whose one number keeps the memory of its elements", peak="within")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_take_what_they_are_counted_for(name: str) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1024), torch.nn.Sigmoid()
    )
    batch, target = torch.randn(32, 64), torch.rand(32, 1024).round()
    given: Any = {"loss_fn": LOSSES[name], "target": target}
    actckpt.optimize(model, 1.0, batch=batch, **given)
    measured = actckpt.measure(model, batch, steps=1, **given)
    predicted = actckpt.report(model).planned.predicted
    assert measured.peak_bytes == predicted.peak_bytes
