"""What a call reads beside its arguments: where the random generators stand, and autocast."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from actckpt.tracing.fake import is_tracing, stands_in


def torch_states(device_type: str) -> dict[str, torch.Tensor]:
    """States of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device_type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def same_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether torch's generators stand where they stood."""
    if is_tracing():
        return True  # fake tensors draw nothing
    return all(torch.equal(state, b[name]) for name, state in a.items())


def digests(states: dict[str, torch.Tensor]) -> tuple[bytes, ...]:
    """What tells states from others in a few bytes."""
    return tuple(blake2b(state.numpy().data, digest_size=16).digest() for state in states.values())


def generator_states(torch_too: bool, names: tuple[str, ...], device_type: str) -> Any:
    """States of the random generators that a stage moves, or None if it moves none."""
    if not torch_too and not names:
        return None
    states: dict[str, Any] = {}
    if torch_too:
        states.update(torch_states(device_type))
        if is_tracing() and not stands_in():
            # generators are real even in a dry run: let its meter see what the state costs; that
            # of an accelerator's is 16 bytes, and kept on the CPU
            states["stand-in"] = torch.empty(states["cpu"].numel(), dtype=torch.uint8)
    if "python" in names:
        states["python"] = random.getstate()
    if "numpy" in names:
        states["numpy"] = np.random.get_state()
    return states


def set_generator_states(states: Any) -> None:
    """Sets what `generator_states` returned."""
    for name, state in (states or {}).items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda":
            torch.cuda.set_rng_state(state)
        elif name == "python":
            random.setstate(state)
        elif name == "numpy":
            np.random.set_state(state)


def autocast_state(device_type: str) -> tuple[tuple[str, bool, torch.dtype], ...]:
    """(device type, enabled, dtype) of each autocast that could matter on this device."""
    return tuple(
        (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in dict.fromkeys(("cpu", device_type))
    )


def autocast_contexts(
    recorded: tuple[tuple[str, bool, torch.dtype], ...],
) -> list[AbstractContextManager[Any]]:
    """Contexts that bring a recorded autocast state back.

    Without the cache of weight casts: a cast of a replay must not outlive it, and its value is
    the same.
    """
    return [
        torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
        for device, enabled, dtype in recorded
        if enabled or torch.is_autocast_enabled(device)
    ]
