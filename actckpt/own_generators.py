"""Random generators beside the global ones: torch's, NumPy's and Python's, and their states."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def source_of(x: Any) -> Any:
    """What holds the state; several of NumPy's may draw from one."""
    return x.bit_generator if isinstance(x, np.random.Generator) else x


def kind_of(x: Any) -> str:
    """Which kind of generator it is, "" for what is none."""
    if isinstance(x, torch.Generator):
        return "torch"
    if isinstance(x, random.Random):
        return "python"
    if isinstance(x, np.random.RandomState):
        return "numpy-legacy"
    if isinstance(x, np.random.Generator | np.random.BitGenerator):
        return f"numpy-{type(source_of(x)).__name__}"
    return ""


def state_of(x: Any) -> dict[str, Any]:
    """Its kind and its state, of which `put_state` takes the latter."""
    state: Any
    if isinstance(x, torch.Generator):
        state = x.get_state()
    elif isinstance(x, random.Random):
        state = x.getstate()
    elif isinstance(x, np.random.RandomState):
        state = x.get_state(legacy=False)
    else:
        state = x.state
    return {"kind": kind_of(x), "state": state}


def put_state(x: Any, state: Any) -> None:
    """Puts it where it was."""
    if isinstance(x, torch.Generator):
        x.set_state(state)
    elif isinstance(x, random.Random):
        x.setstate(state)
    elif isinstance(x, np.random.RandomState):
        x.set_state(state)
    else:
        x.state = state
