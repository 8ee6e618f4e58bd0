"""The suite itself: every case repeats to the last bit, and is mostly activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.suite import CASES, Case, adamw, call, gradients, loss_of, step, trainable

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(case: Case, steps: int = 2) -> dict[str, Any]:
    """Everything that steps of a fresh model leave behind."""
    model, batch = case.build(), case.batch()
    optimizer = (case.optimizer or adamw)(trainable(model))
    torch.manual_seed(0)
    losses = [step(case, model, batch, optimizer) for _ in range(steps)]
    return {
        "loss": dict(enumerate(losses)),
        "gradients": gradients(model),
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "random state": {0: torch.get_rng_state()},
    }


@cases
def test_two_runs_from_one_seed_are_bitwise_equal(case: Case) -> None:
    first, second = run(case), run(case)
    for kind, tensors in first.items():
        assert tensors.keys() == second[kind].keys()
        different = [n for n, t in tensors.items() if not torch.equal(t, second[kind][n])]
        assert not different, f"{kind} differ: {different[:5]}"
    assert all(torch.isfinite(t).all() for t in first["loss"].values())


@cases
def test_build_and_batch_leave_random_state_alone(case: Case) -> None:
    before = torch.get_rng_state()
    assert case.build().training
    case.batch()
    assert torch.equal(torch.get_rng_state(), before)


@cases
def test_tags_are_true(case: Case) -> None:
    model, batch = case.build(), case.batch()
    before = torch.get_rng_state()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    output = call(model, batch)
    assert ("cache" in case.tags) == (getattr(output, "past_key_values", None) is not None)
    step(case, model, batch)
    moved = any(not torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert ("random" in case.tags) == (not torch.equal(torch.get_rng_state(), before))
    assert ("batchnorm" in case.tags) == moved
    assert ("frozen" in case.tags) == any(not p.requires_grad for p in model.parameters())
    tied = len(list(model.named_parameters(remove_duplicate=False)))
    assert ("tied" in case.tags) == (tied > len(list(model.named_parameters())))
    assert gradients(model).keys() == {n for n, p in model.named_parameters() if p.requires_grad}


@cases
def test_activations_dominate(case: Case) -> None:
    model = case.build()
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in params(model)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=case.autocast),
    ):
        output = call(model, case.batch())
        loss = loss_of(case, output)
    assert loss.requires_grad
    assert 15e6 < sum(saved.values()) < 150e6
    assert sum(saved.values()) > 10 * sum(held.values())


def params(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())
