"""The random states of Python, NumPy, torch and every CUDA device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def gather_random_states() -> dict[str, Any]:
    """The states as they are now; those of CUDA devices only where CUDA is in use."""
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def put_random_states(states: dict[str, Any]) -> None:
    """Puts back what `gather_random_states` found, as far as there are devices for it."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)


def lost_random_states(states: dict[str, Any]) -> str:
    """What of the states has no place here; "" if nothing."""
    saved, here = len(states.get("cuda", ())), torch.cuda.device_count()
    if saved > here:
        return f"the random states of {saved - here} of {saved} CUDA devices, which are not here"
    return ""
