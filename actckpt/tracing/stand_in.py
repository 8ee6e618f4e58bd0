"""Fake CPU tensors that stand for an accelerator's: which one, and what differs there.

Autograd on fake CUDA tensors ends the process on a build without CUDA, so a step on a device that
is not here is traced on fake CPU tensors, with the operations that the device would run.
"""

from __future__ import annotations

from dataclasses import dataclass

# every block of torch's CUDA allocator is a multiple of this
CUDA_GRANULE_BYTES = 512


@dataclass(frozen=True, slots=True)
class StandIn:
    """The accelerator that fake CPU tensors stand for.

    ``capability`` is CUDA's (AMD's cards answer with theirs, and are ``rocm``).
    """

    name: str
    capability: tuple[int, int]
    rocm: bool = False


def allocated_bytes(size: int, device_type: str, stand_in: StandIn | None = None) -> int:
    """What the allocator hands out for a storage of ``size`` bytes."""
    if device_type == "cuda" or stand_in is not None:
        return -(-size // CUDA_GRANULE_BYTES) * CUDA_GRANULE_BYTES
    return size
