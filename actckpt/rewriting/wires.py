"""What a run knows of the tensors that calls return: weak references, by wire."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch

from actckpt.tracing.signature import settled

# storage, shape, stride, offset, dtype
Window = tuple[int, tuple[int, ...], tuple[int, ...], int, torch.dtype]
Wires = list[Callable[[], Any]]

_SEEN = nullcontext()


def nothing() -> None:
    """The tensor of a wire that no call has returned yet."""


def loose() -> None:
    """The tensor of a wire between stretches: whichever is first given in its place."""


@dataclass(frozen=True, slots=True)
class ViewOf:
    """The tensor of a wire that no compared call has returned: a window of a known storage.

    ``root`` is the place of that storage's own tensor among the wires: what the call that made it
    returned, or, where nobody compared that one, whatever is first given a window of it.
    """

    root: int
    window: Window

    def __call__(self) -> None:
        """No tensor has been given in its place yet."""

    def is_this(self, found: torch.Tensor, wires: Wires) -> bool:
        """Whether a tensor is this window of that storage, which must still be there."""
        if not is_laid_out(found, self.window) or found.storage_offset() != self.window[3]:
            return False
        root = root_of(found)
        known = wires[self.root]
        if known is nothing:
            wires[self.root] = ref(root)
            return True
        return known() is root


def is_laid_out(tensor: torch.Tensor, window: Window) -> bool:
    """Whether a tensor has the shape, strides and type of a window."""
    _, shape, stride, _, dtype = window
    if tensor.shape != shape or tensor.dtype != dtype or tensor.layout != torch.strided:
        return False
    found = tensor.stride()
    return found == stride or settled(shape, found) == settled(shape, stride)


def root_of(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor is a view of, or itself: the same object as long as a view of it lives."""
    with _unseen():
        base = tensor._base
    return tensor if base is None else base


def is_taken(wires: Wires, wire: int, found: Any) -> bool:
    """Whether a tensor may be that of a wire that no compared call has returned; then it is."""
    if not isinstance(found, torch.Tensor):
        return False
    known = wires[wire]
    if type(known) is ViewOf:
        with _unseen():
            is_this = known.is_this(found, wires)
        if not is_this:
            return False
    elif known is not loose:
        return False
    wires[wire] = ref(found)
    return True


def _unseen() -> AbstractContextManager[Any]:
    """Where a torch function mode of the user's own does not see what is asked of a tensor."""
    enabled = torch._C._is_torch_function_mode_enabled()
    return torch._C.DisableTorchFunction() if enabled else _SEEN
