"""What one training of a case leaves behind, and how its peak is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.loop_peaks import metered, resident_bytes


@dataclass(slots=True)
class Outcome:
    """One training, or the rest of one.

    Args:
        losses: optimizer step -> loss that was logged for it.
        weights: digest of the final weights.
        resident_bytes: of models and optimizer, in every step.
        peak_bytes: highest of the process's second to fourth step, residents included.
        resumed: step that it went on from; 0 where it began.
        inexact: why resuming was said not to be exact.
    """

    losses: dict[str, float] = field(default_factory=dict)
    weights: str = ""
    resident_bytes: int = 0
    peak_bytes: int = 0
    resumed: int = 0
    inexact: tuple[str, ...] = ()

    @contextmanager
    def step(self, *residents: Any) -> Iterator[None]:
        """Meanwhile one step is made."""
        before = resident_bytes(*residents)
        with metered() as meter:
            yield
        self.resident_bytes = max(self.resident_bytes, before)
        self.peak_bytes = max(self.peak_bytes, before + meter.peak_bytes)


def digest(model: nn.Module) -> str:
    """Of every parameter's bits."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(name.encode())
        found.update(p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def is_same_run(whole: Outcome, rest: Mapping[str, float], weights: str) -> bool:
    """Whether every later loss and the final weights are those of the whole run."""
    return weights == whole.weights and all(whole.losses[step] == x for step, x in rest.items())
