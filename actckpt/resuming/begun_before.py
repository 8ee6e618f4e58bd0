"""Passes that torchdata's loader began when its state was asked for, before anybody iterates.

accelerate asks for it when it prepares one. The first pass is then over an iterator whose order was
drawn in the meantime. It is begun anew, from what that order was drawn from.
"""

from __future__ import annotations

from typing import Any

import torch

from actckpt.resuming.generators import generators_of


def is_begun_before(source: Any) -> bool:
    """Whether the next pass over a loader is one that has begun."""
    return bool(getattr(source, "_initial_iter_for_state_dict", False))


def forget_begun(source: Any) -> None:
    """The next pass begins when it is asked for."""
    if is_begun_before(source):
        source._iterator = None
        source._initial_iter_for_state_dict = False


def drawn_before(source: Any) -> dict[str, Any]:
    """The states of the loader's generators from before that pass was begun."""
    generators = generators_of({"loader": source})
    now = generators.states()
    iterator = getattr(source._iterator, "_sampler_iter", None)
    while iterator is not None:
        state = getattr(iterator, "generator_state", None)
        generator = getattr(getattr(iterator, "sampler", None), "generator", None)
        if isinstance(state, torch.Tensor) and isinstance(generator, torch.Generator):
            generator.set_state(state)
        iterator = getattr(iterator, "sampler_iter", None)
    try:
        return generators.states()
    finally:
        generators.put(now)
