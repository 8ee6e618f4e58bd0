"""What wraps a planned model or compiles it: what a plan cannot count of that is said, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from actckpt.tracing.compiled import compiled_inside, is_compiled
from actckpt.tracing.forwards import around

logger = logging.getLogger("actckpt")


class Surroundings:
    """Those of one model, with what was said of them."""

    def __init__(self) -> None:
        self._told_around = self._told_compiled = self._told_inside = False

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
