"""How far below its budget a plan aims, so that the measured peak stays within it."""

from __future__ import annotations

import os

from torch import nn

# what a kernel allocates can differ by a little
AIM = 0.995
# the same of an untouched step, whose dry run is exact to 1e-5 (`make grid`)
UNTOUCHED_AIM = 0.9998
# CUDA's allocator hands a block over whole where less than a megabyte would remain of it, and
# counts all of it: up to 1.4 % of a ResNet-152 on an H100, nothing of GPT-2 or a U-Net
# (experiments/results/gpu.md); expandable segments are cut to size
BLOCKS_AIM = 0.98
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def aims(model: nn.Module) -> tuple[float, float]:
    """Shares of the budget: (what a plan's predicted peak may take, what the untouched step may).

    Args:
        model: where its parameters are; a plan for an absent device is nobody's measurement.
    """
    if any(p.is_cuda for p in model.parameters()) and not _expandable():
        return BLOCKS_AIM, BLOCKS_AIM
    return AIM, UNTOUCHED_AIM


def _expandable() -> bool:
    """Whether CUDA's allocator was told to use expandable segments."""
    return any("expandable_segments:true" in os.environ.get(s, "").lower() for s in _SETTINGS)
