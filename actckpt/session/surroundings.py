"""What a planned model is run in and beside: what a plan cannot count of that is said, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from actckpt.session.neighbours import neighbours
from actckpt.tracing.compiled import compiled_inside, is_compiled
from actckpt.tracing.forwards import around
from actckpt.units import format_bytes

logger = logging.getLogger("actckpt")


class Surroundings:
    """Those of one model, with what was said of them.

    Attributes:
        beside: what a report says of other models on the device.
    """

    def __init__(self) -> None:
        self.beside: tuple[str, ...] = ()
        self._told_beside = False
        self._told_around = self._told_compiled = self._told_inside = False
        self._told_computed = False

    def outside(self, model: nn.Module, entry: str) -> Callable[[Any], Any] | None:
        """What is done to outputs outside the planned forward, as far as it is known."""
        stands = around(model, entry)
        if stands.unknown and not self._told_around:
            self._told_around = True
            logger.warning(
                "actckpt: planning for the forward of the %s beneath %s, which wraps it: what that "
                "does to inputs and outputs takes memory that is not counted",
                type(model).__name__,
                stands.unknown,
            )
        return stands.outside

    def note_beside(self, model: nn.Module) -> None:
        """Looks for other models on the device, and says once what is not trained of them.

        A reference model or a teacher runs in the step; an average of weights does not.
        """
        found = neighbours(model)
        if not found:
            return
        listed = ", ".join(f"{n.name} of {format_bytes(n.held_bytes)}" for n in found)
        self.beside = (
            f"on the device of the {type(model).__name__} there is besides: {listed}. What "
            "forwards of these take in the step is not counted, nor are their weights, unless a "
            "trainer's MemoryBudget has taken them off the budget",
        )
        if self._told_beside or not found[0].frozen:
            return
        self._told_beside = True
        one = found[0]
        logger.warning(
            "actckpt: a %s that is not trained (%s) is on the device of the %s. If it runs in "
            "the step, as a reference model or a teacher does, what its forward takes is not "
            "planned for, nor are its weights, unless a trainer's MemoryBudget has taken them off: "
            "the step may take that much more than the budget",
            one.name,
            format_bytes(one.held_bytes),
            type(model).__name__,
        )

    def note_compiled(self, model: nn.Module, *, calling: bool = False) -> None:
        """Says once that a compiled model runs as it is written."""
        if self._told_compiled or not is_compiled(model, calling=calling):
            return
        self._told_compiled = True
        logger.warning(
            "actckpt: the %s is compiled, and what is planned runs eagerly: the plan holds, and "
            "nothing of the model is compiled. Leave torch.compile out, or call "
            "actckpt.revert(model) to train it compiled without a plan",
            type(model).__name__,
        )

    def note_computed(self) -> None:
        """Says once that a forward runs on weights that have a graph."""
        if self._told_computed:
            return
        self._told_computed = True
        logger.warning(
            "actckpt: a forward runs on weights that were computed (torch.func.functional_call): "
            "they, and graphs of this model's own forwards that they come from (inner steps), are "
            "planned for from the next step on. Other graphs that they come from are not, and this "
            "step may take more memory than the budget"
        )

    def compiled_inside(self, model: nn.Module) -> bool:
        """Whether modules inside are compiled: they save other tensors than as written."""
        inside = compiled_inside(model)
        if inside and not self._told_inside:
            self._told_inside = True
            logger.warning(
                "actckpt: %d modules inside the %s are compiled (%s, ...): planning by calls. What "
                "is recomputed runs as written; what others save for backward is taken to be what "
                "they save as written",
                len(inside),
                type(model).__name__,
                inside[0],
            )
        return bool(inside)
