"""Steps of a planned model beside those of the untouched one: bits, and peaks by the allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import actckpt
from actckpt.profiler.census import resident_bytes
from actckpt.profiler.meter import AllocatorMeter

# (model) -> the loss, after its backward
Step = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What every step of a planned model took and made.

    Attributes:
        budget_bytes: what was asked for.
        peaks: of each step, the first one included.
        different: parameters whose gradients, or "loss", are not bitwise those of the untouched.
    """

    budget_bytes: int
    peaks: tuple[int, ...]
    different: tuple[str, ...]

    @property
    def exact_and_within(self) -> bool:
        return not self.different and all(p <= self.budget_bytes for p in self.peaks)


def step_peak(model: nn.Module, step: Step, batch: Any) -> tuple[int, torch.Tensor]:
    """(bytes that exist at entry and the highest level above them, the loss)."""
    gc.collect()
    residents = sum(resident_bytes(model, None, batch).values())
    with AllocatorMeter("cpu") as meter:
        loss = step(model).detach()
    return residents + meter.peak_bytes, loss


def floor_bytes(model: nn.Module, batch: Any) -> int:
    """Parameters, buffers, gradients and batch: what no plan can save."""
    trained = (p.untyped_storage().nbytes() for p in model.parameters() if p.requires_grad)
    return sum(resident_bytes(model, None, batch).values()) + sum(trained)


def outcome_of(
    make: Callable[[], nn.Module],
    batch: Any,
    step: Step,
    *,
    share: float,
    steps: int = 2,
    **options: Any,
) -> Outcome:
    """Plans for a share of the activations of a step and takes some steps.

    Args:
        make: the model, the same each time.
        batch: as for `actckpt.optimize`, and what ``step`` closes over; its tensors count.
        options: of `actckpt.optimize`.
    """
    plain, planned = make(), make()
    step(plain).detach()  # kernels' own first-time allocations
    plain.zero_grad()
    whole, _ = step_peak(plain, step, batch)
    floor = floor_bytes(plain, batch)
    budget = int(floor + share * (whole - floor))
    actckpt.optimize(planned, budget / 1e9, batch=batch, **options)
    peaks, different = [], dict[str, None]()
    for _ in range(steps):
        plain.zero_grad()
        planned.zero_grad()
        expected = step(plain).detach()
        peak, loss = step_peak(planned, step, batch)
        peaks.append(peak)
        different.update(dict.fromkeys(differences(plain, planned)))
        if not torch.equal(loss, expected):
            different["loss"] = None
    return Outcome(budget, tuple(peaks), tuple(different))


def differences(plain: nn.Module, planned: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not bitwise the same."""
    pairs = zip(plain.named_parameters(), planned.parameters(), strict=True)
    return [
        name
        for (name, p), q in pairs
        if (p.grad is None) != (q.grad is None)
        or (p.grad is not None and q.grad is not None and not torch.equal(p.grad, q.grad))
    ]
