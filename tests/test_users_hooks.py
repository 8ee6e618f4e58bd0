"""Saved-tensor hooks of the user's own, round the loop or inside blocks of a planned model."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import actckpt
from tests.exact import differences
from tests.test_several_backwards import WIDTH, Block, batch, peak

Open = Callable[[], AbstractContextManager[Any]]


def to_disk(folder: Path) -> Open:
    """Hooks that write what is saved to files, and no parameters."""

    def pack(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, nn.Parameter):
            return tensor
        path = folder / str(uuid.uuid4())
        torch.save(tensor, path)
        return path

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        found: torch.Tensor = torch.load(packed)
        return found

    return lambda: saved_tensors_hooks(pack, unpack)


class Offloads(nn.Module):
    """A block that opens hooks round its own forward."""

    def __init__(self, hooks: Open) -> None:
        super().__init__()
        self.block = Block()
        self.hooks = [hooks]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.hooks[0]():
            out: torch.Tensor = self.block(x)
        return out


def make(inside: Open | None) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block() if inside is None or n < 2 else Offloads(inside) for n in range(4)]
    return nn.Sequential(*blocks, nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))


def stepped(around: Open) -> Callable[[nn.Module, torch.Tensor], None]:
    def step(model: nn.Module, x: torch.Tensor) -> None:
        with around():
            loss = model(x).square().mean()
        loss.backward()

    return step


def trained(step: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    for n in range(2):
        step(model, batch())
        for name, p in model.named_parameters():
            assert p.grad is not None
            found[f"{n} {name}"] = p.grad.clone()
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
            p.grad = None
    return found


@pytest.mark.kind("saved-tensor hooks of the user's own", bits=True, peak="within")
@pytest.mark.parametrize("policy", ["auto", "calls"])
@pytest.mark.parametrize("where", ["round the loop", "inside blocks", "on the CPU"])
def test_they_work_together_with_a_plan(where: str, policy: str, tmp_path: Path) -> None:
    disk = to_disk(tmp_path)
    inside = disk if where == "inside blocks" else None
    around = {"round the loop": disk, "on the CPU": save_on_cpu}.get(where, nullcontext)
    step = stepped(around)
    model = make(inside)
    full = peak(stepped(nullcontext), make(None), batch())
    expected = trained(step, copy.deepcopy(model))
    budget = int((0.7 if inside is None else 0.85) * full)
    actckpt.optimize(model, budget / 1e9, policy=policy)  # plans within the hooks
    assert not differences(expected, trained(step, model))
    report = actckpt.report(model)
    assert report.plan.regions or report.plan.bursts
    assert peak(step, model, batch()) <= budget


def test_planning_runs_none_of_them_and_leaves_them_open(tmp_path: Path) -> None:
    model = make(to_disk(tmp_path))
    enter = saved_tensors_hooks.__enter__
    with to_disk(tmp_path)():
        actckpt.optimize(model, None, batch=batch(), policy="full")
        assert not list(tmp_path.iterdir())
        assert saved_tensors_hooks.__enter__ is enter
        batch().requires_grad_().exp()
        assert len(list(tmp_path.iterdir())) == 1
