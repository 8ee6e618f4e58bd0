"""Models that already checkpoint themselves are refused: two owners of one memory is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from actckpt.errors import PlanError


@contextmanager
def refuse_self_checkpointing() -> Iterator[None]:
    """While open, a call of `torch.utils.checkpoint` in either form raises a `PlanError`."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PlanError(
            "the model already checkpoints itself with torch.utils.checkpoint; switch that off "
            "first (Hugging Face: model.activation_checkpointing_disable(), before transformers "
            "5.23 model.gradient_checkpointing_disable()), actckpt takes its place"
        )

    names = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
    originals = {name: getattr(torch_checkpoint, name) for name in names}
    stand_in = type("CheckpointFunction", (), {"apply": staticmethod(refuse)})
    setattr(torch_checkpoint, names[0], refuse)
    setattr(torch_checkpoint, names[1], stand_in)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch_checkpoint, name, original)
