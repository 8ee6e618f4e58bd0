"""Meta tensors that stand for tensors of a batch which may be gone."""

from __future__ import annotations

import torch

from actckpt.tracing.real_values import is_small

_DEVICE = "_actckpt_device"
_VALUES = "_actckpt_values"


def may_outline(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one whose shape, strides and dtype say it all."""
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    return plain and tensor.device.type != "meta" and not tensor.is_nested


def outlined(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor as ``tensor``, with the values of small ones, as a trace may ask for them."""
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
    ).requires_grad_(tensor.requires_grad)
    made.__dict__[_DEVICE] = tensor.device
    if is_small(tensor) and not tensor.requires_grad:
        made.__dict__[_VALUES] = tensor.detach().to("cpu", copy=True)
    return made


def device_of(tensor: torch.Tensor) -> torch.device | None:
    """Where what a meta tensor stands for was; None where it stands for nothing."""
    found: torch.device | None = tensor.__dict__.get(_DEVICE) if tensor.is_meta else None
    return found


def values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values that an outlined tensor had, if they were kept."""
    found: torch.Tensor | None = tensor.__dict__.get(_VALUES)
    return found
