"""The random states of Python, NumPy, torch and every CUDA device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import xxhash


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


def other_stream(states: dict[str, Any], number: int) -> dict[str, Any]:
    """States to draw from that have nothing to do with these, the same for the same number."""
    key = states["torch"].numpy().tobytes() + number.to_bytes(8, "little")
    seed = xxhash.xxh3_64_intdigest(key)
    found: dict[str, Any] = {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed % 2**32).get_state(legacy=False),
        "torch": torch.Generator().manual_seed(seed % 2**63).get_state(),
    }
    if "cuda" in states:
        # eight bytes of seed, eight of offset
        found["cuda"] = [
            torch.tensor(list((seed + n).to_bytes(16, "little")), dtype=torch.uint8)
            for n in range(len(states["cuda"]))
        ]
    return found


def lost_random_states(states: dict[str, Any]) -> str:
    """What of the states has no place here; "" if nothing."""
    saved, here = len(states.get("cuda", ())), torch.cuda.device_count()
    if saved > here:
        return f"the random states of {saved - here} of {saved} CUDA devices, which are not here"
    return ""
