"""Weights in 4 bits as bitsandbytes keeps them: a state of more than torch's loading takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def scale_keys(module: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """The keys of a state that hold scales of quantized weights, which are no tensors of modules.

    How many bytes some of them have depends on the values.
    """
    prefixes = tuple(prefix for prefix, *_ in _quantized(module))
    return {key for key in state if key.startswith(prefixes)} if prefixes else set()


def without_scales(
    module: nn.Module, state: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Callable[[], None]]:
    """What of a state torch can load, and what puts the rest, once that is loaded.

    Raises:
        Exception: as the library does where the scales are not its own.
    """
    keys = scale_keys(module, state)
    if not keys:
        return state, lambda: None
    rest = type(state)((key, x) for key, x in state.items() if key not in keys)  # type: ignore[call-arg]
    if hasattr(state, "_metadata"):
        rest._metadata = state._metadata  # type: ignore[attr-defined]
    made = [
        (owner, weight, type(weight.quant_state).from_dict(scales, weight.device))
        for prefix, owner, weight in _quantized(module)
        if (scales := {k.removeprefix(prefix): state[k] for k in keys if k.startswith(prefix)})
    ]

    def put() -> None:
        for owner, weight, found in made:
            weight.quant_state = found
            if getattr(owner, "quant_state", None) is not None:
                owner.quant_state = found

    return rest, put


def _quantized(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(prefix of the keys of its scales, module, weight) of every quantized one."""
    for path, owner in module.named_modules():
        for name, weight in owner._parameters.items():
            scales = getattr(weight, "quant_state", None)
            if isinstance(weight, torch.Tensor) and hasattr(type(scales), "from_dict"):
                yield f"{path}.{name}." if path else f"{name}.", owner, weight
