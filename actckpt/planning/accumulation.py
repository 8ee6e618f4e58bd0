"""Gradients that stay from one backward to the next: what a plan makes of them."""

from __future__ import annotations

import sys

from actckpt.data.graph import Category
from actckpt.planning.request import Planned
from actckpt.tracing.step import Step


def accumulating() -> bool:
    """Whether accelerate says that the backward at hand is not the last one before the step.

    Trainers that stand on it (transformers', TRL's) say so before the forward.
    """
    module = sys.modules.get("accelerate.state")
    state = getattr(getattr(module, "GradientState", None), "_shared_state", {})
    return state.get("sync_gradients") is False


def resident_peak_bytes(planned: Planned, step: Step) -> int | None:
    """The peak of the same plan where backward finds gradients; None where it is not known.

    Each gradient is then there from the start, and what backward makes goes as it is added: the
    dry run's levels with all gradients in the place of those that have arrived.
    """
    if step.backwards or any(one.in_backward for one in step.optimizers):
        return None  # gradients go early, or come twice
    gradient = str(Category.GRADIENT)
    resident = sum(s.bytes for s in planned.graph.storages if s.category is Category.GRADIENT)
    levels = (sum(at.values()) - at.get(gradient, 0) for at in planned.dry.timeline)
    return max(levels, default=0) + resident
