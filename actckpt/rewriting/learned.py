"""A call as it was seen to be made, and whether another is the same on the same tensors.

Every tensor that a call returns is a *wire*; what is known of it is a weak reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch

from actckpt.rewriting.schedule import CallProgram

_COMPARED = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format, type(Ellipsis),
)  # fmt: skip


def nothing() -> None:
    """The tensor of a wire that no call has returned yet."""


def loose() -> None:
    """The tensor of a wire between stretches: whichever is first given in its place."""


@dataclass(frozen=True, slots=True)
class Wired:
    """Stands for a tensor argument; its wire, -1 for one of unknown origin."""

    wire: int


@dataclass(frozen=True, slots=True)
class Learned:
    """A call as a run was seen to make it, with `Wired` in place of its tensors.

    Args:
        shown: its arguments have tensors to pin, or the random state before it is needed again.
        casting: the autocast that it was made under.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: CallProgram
    shown: bool
    casting: str


def template(x: Any, sources: Iterator[int]) -> Any:
    """``x`` with a mark in place of each tensor."""
    if isinstance(x, torch.Tensor):
        return Wired(next(sources))
    if isinstance(x, list):
        return [template(i, sources) for i in x]
    if isinstance(x, tuple):
        return tuple(template(i, sources) for i in x)
    if type(x) is dict:
        return {key: template(value, sources) for key, value in x.items()}
    if isinstance(x, slice):
        return slice(*(template(i, sources) for i in (x.start, x.stop, x.step)))
    return x


def is_same(known: Learned, args: Any, kwargs: Any, wires: list[Callable[[], Any]]) -> bool:
    """Whether the arguments of a call are those that are known, on the same tensors."""
    if len(known.args) != len(args) or len(known.kwargs) != len(kwargs):
        return False
    for e, f in zip(known.args, args, strict=True):
        # what most arguments are, without a call; no wire gives None where a tensor is expected,
        # and the last one is not wire -1
        if e is f or (type(e) is Wired and e.wire >= 0 and wires[e.wire]() is f is not None):
            continue
        if not same(e, f, wires):
            return False
    for key, e in known.kwargs.items():
        f = kwargs.get(key, nothing)
        if e is not f and not same(e, f, wires):
            return False
    return True


def same(expected: Any, found: Any, wires: list[Callable[[], Any]]) -> bool:
    """Whether an argument is as it was, its tensors included."""
    kind = type(expected)
    if kind is Wired:
        if expected.wire < 0:
            return isinstance(found, torch.Tensor)
        if wires[expected.wire] is loose and isinstance(found, torch.Tensor):
            wires[expected.wire] = ref(found)
            return True
        return found is not None and wires[expected.wire]() is found  # else of a dead one
    if kind is tuple or kind is list:
        if not isinstance(found, kind) or len(expected) != len(found):
            return False
        return all(e is f or same(e, f, wires) for e, f in zip(expected, found, strict=True))
    if kind is not type(found):
        return False
    if kind is dict:
        return expected.keys() == found.keys() and all(
            same(e, found[key], wires) for key, e in expected.items()
        )
    if kind is slice:
        return all(
            same(getattr(expected, end), getattr(found, end), wires)
            for end in ("start", "stop", "step")
        )
    if isinstance(expected, _COMPARED):
        return bool(expected == found)
    return expected is found
