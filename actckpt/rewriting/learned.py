"""A call as it was seen to be made, and whether another is the same on the same tensors.

Every tensor that a call returns is a *wire*; what is known of it is a weak reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from actckpt.rewriting.schedule import CallProgram
from actckpt.rewriting.wires import Wires, is_taken, nothing
from actckpt.tracing.calls import casting, leaves

_COMPARED = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format, type(Ellipsis),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wired:
    """Stands for a tensor argument; its wire, -1 for one of unknown origin."""

    wire: int


@dataclass(slots=True)
class Learned:
    """A call as a run was seen to make it.

    Attributes:
        count: of arguments without a name.
        wired: position and wire of each of them that is a tensor of known origin.
        others: position of each other one, with `Wired` in place of tensors; ``named`` likewise.
        places: positions of all tensors, None where some are inside of lists, or named.
        shown: its arguments have tensors to pin, or the random state before it is needed again.
        casting: the autocast that it was made under.
        wants: what `wanted` was when autograd's saves were counted; None before.
    """

    func: Any
    call: CallProgram
    count: int
    wired: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, Any], ...]
    named: dict[str, Any]
    places: tuple[int, ...] | None
    shown: bool
    casting: str
    wants: list[bool] | None = None

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, call: CallProgram) -> Learned:
        """What is being called."""
        sources = iter(call.sources)
        given, named = _template(args, sources), _template(kwargs, sources)
        tensors = [n for n, e in enumerate(given) if type(e) is Wired]
        known = [(n, given[n].wire) for n in tensors if given[n].wire >= 0]
        unknown = set(range(len(given))).difference(n for n, _ in known)
        return cls(
            func,
            call,
            len(given),
            tuple(known),
            tuple((n, given[n]) for n in sorted(unknown)),
            named,
            tuple(tensors) if len(tensors) == len(call.sources) else None,
            call.draws or not all(c.result for c in call.captures),
            casting(),
        )

    def is_made(self, args: Any, kwargs: Any, wires: Wires) -> bool:
        """Whether a call of the same function has these arguments, on the same tensors."""
        if self.count != len(args) or len(self.named) != len(kwargs):
            return False
        for n, wire in self.wired:
            found = args[n]
            # no wire gives None where a tensor is expected
            if (wires[wire]() is not found or found is None) and not is_taken(wires, wire, found):
                return False
        for n, e in self.others:
            found = args[n]
            if e is not found and not same(e, found, wires):
                return False
        for key, e in self.named.items():
            found = kwargs.get(key, nothing)
            if e is not found and not same(e, found, wires):
                return False
        return True

    def tensors(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """The tensors that are given, in order."""
        if self.places is None:
            return leaves((args, kwargs))
        return [args[n] for n in self.places]

    def wanted(self, args: Any, kwargs: Any) -> list[bool]:
        """Whether gradients are enabled, and wanted of each tensor that is given.

        The same call on the same tensors saves the same ones for backward where this is the same.
        """
        given = self.tensors(args, kwargs)
        return [torch.is_grad_enabled(), *[t.requires_grad for t in given]]


def _template(x: Any, sources: Iterator[int]) -> Any:
    """``x`` with a mark in place of each tensor."""
    if isinstance(x, torch.Tensor):
        return Wired(next(sources))
    if isinstance(x, list):
        return [_template(i, sources) for i in x]
    if isinstance(x, tuple):
        return tuple([_template(i, sources) for i in x])
    if type(x) is dict:
        return {key: _template(value, sources) for key, value in x.items()}
    if isinstance(x, slice):
        return slice(*(_template(i, sources) for i in (x.start, x.stop, x.step)))
    return x


def same(expected: Any, found: Any, wires: Wires) -> bool:
    """Whether an argument is as it was, its tensors included."""
    kind = type(expected)
    if kind is Wired:
        if expected.wire < 0:
            return isinstance(found, torch.Tensor)
        if found is not None and wires[expected.wire]() is found:  # else of a dead one
            return True
        return is_taken(wires, expected.wire, found)
    if kind is tuple or kind is list:
        if not isinstance(found, kind) or len(expected) != len(found):
            return False
        if all(map(is_, expected, found)):
            return True  # small numbers, most of the time
        for e, f in zip(expected, found, strict=True):
            if type(e) is Wired and f is not None and wires[e.wire]() is f and e.wire >= 0:
                continue
            if e is not f and not same(e, f, wires):
                return False
        return True
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
