"""One step as a model makes it, compared with the untouched model's and metered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from experiments.peers.meter import measured_peak
from experiments.peers.models import SEED
from experiments.peers.subject import Subject


@dataclass(slots=True)
class Arm:
    """A way to run the step, and what its first step and its meter said."""

    run: Callable[[], None]
    gradients: float | None = 0.0
    buffers: float | None = 0.0
    peak_bytes: int = 0
    whole_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """Gradients and buffers of the untouched model after its first step."""

    gradients: tuple[torch.Tensor | None, ...]
    buffers: tuple[torch.Tensor, ...]


def tried(
    subject: Subject, model: nn.Module, runs: nn.Module, first: Reference | None
) -> tuple[Arm, Reference]:
    """The arm after its first step, which is compared, and a later one, which is metered.

    Args:
        model: holds the parameters and buffers.
        runs: what is called.
    """
    parameters, buffers = tuple(model.parameters()), tuple(model.buffers())
    arm = Arm(subject.step(runs))
    torch.manual_seed(SEED)
    arm.run()
    seen = Reference(
        tuple(None if p.grad is None else p.grad.clone() for p in parameters),
        tuple(b.clone() for b in buffers),
    )
    if first is not None:
        arm.gradients = _compared(seen.gradients, first.gradients)
        arm.buffers = _compared(seen.buffers, first.buffers)
    torch.manual_seed(SEED)
    arm.run()
    peak = measured_peak(arm.run, parameters)
    arm.peak_bytes, arm.whole_bytes = peak.activation_bytes, peak.whole_bytes
    return arm, seen


def _compared(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]
) -> float | None:
    """The largest difference over the largest value of its tensor; 0 only where every bit is equal,
    None where one has a tensor that the other lacks."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return None
        elif not torch.equal(a, b):
            scale = b.double().abs().max().item() or 1.0
            difference = (a.double() - b.double()).abs().max().item() / scale
            # a NaN, or equal numbers of other bits
            worst = max(worst, difference if math.isfinite(difference) else 1.0, 1e-30)
    return worst
