"""Models whose parameters have been split over processes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from actckpt.errors import PlanError

_SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def refuse_sharded(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuses a model that was sharded after it was optimized.

    Raises:
        PlanError: FSDP holds its parameters, and takes them away before backward recomputes.
    """
    kinds = {type(m) for m in modules}
    by_class = any(c.__name__ in _SHARDED for kind in kinds for c in kind.__mro__)
    flattened = next(model.parameters(), None) is None or any(
        getattr(p, "_fsdp_flattened", False) for p in model.parameters()
    )
    if by_class or flattened:
        raise PlanError(
            f"the {type(model).__name__} was sharded (FSDP, fully_shard) after actckpt.optimize: "
            "its parameters are not there when backward recomputes, and plans for sharded models "
            "are not supported yet. Call actckpt.revert(model), and leave actckpt.optimize out"
        )
