"""`torch.func` transforms inside a forward that is looked at: they take no saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import graph

from actckpt.data.graph import TRANSFORMS
from actckpt.tracing.recorder import Recorder

_may_hook: Callable[[], bool] = getattr(
    torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True
)


def in_transform() -> bool:
    """Whether one that differentiates is running: saved-tensor hooks are off inside of it."""
    return not _may_hook()


@contextmanager
def hooks_off_in_transforms(recorder: Recorder) -> Iterator[None]:
    """A recorder's saved-tensor hooks, put aside where a transform begins and back where it ends.

    What is saved inside a transform is not seen: it is gone when the transform returns. The stage
    that runs it is refused.
    """
    original = graph.disable_saved_tensors_hooks
    ours = graph.saved_tensors_hooks(recorder.pack, recorder.unpack)
    open_ = [0]

    @contextmanager
    def disable(message: str) -> Iterator[None]:
        aside = open_[0]
        if aside:
            recorder.refuse(TRANSFORMS)
            ours.__exit__()
            open_[0] = 0
        try:
            with original(message):
                yield
        finally:
            if aside:
                ours.__enter__()
                open_[0] = aside

    graph.disable_saved_tensors_hooks = disable  # type: ignore[assignment]
    try:
        with ours:
            open_[0] = 1
            yield
    finally:
        open_[0] = 0
        graph.disable_saved_tensors_hooks = original
