"""Saved-tensor hooks of the user's own, round a loop or inside a forward, while a step is fake.

They may write to a disk or another device, which fake tensors cannot be: others stand in for them,
which keep what is saved as it is. So what the user's own put elsewhere counts as resident.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@contextmanager
def users_hooks_replaced() -> Iterator[None]:
    """No saved-tensor hook of the user's own sees a tensor while this is open."""
    original = saved_tensors_hooks.__enter__

    def enter(self: saved_tensors_hooks) -> Any:
        pack = getattr(self.pack_hook, "__module__", None) or ""
        if pack == "actckpt" or pack.startswith("actckpt."):
            return original(self)
        return original(_stand_in())

    with ExitStack() as stack:
        if _top is None or _top(False) is not None:
            stack.enter_context(_stand_in())
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        stack.callback(setattr, saved_tensors_hooks, "__enter__", original)
        yield


def _stand_in() -> saved_tensors_hooks:
    return saved_tensors_hooks(_keep, _give)


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def _give(kept: torch.Tensor) -> torch.Tensor:
    return kept
