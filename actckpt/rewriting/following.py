"""Follows a forward call by call: whether it is the traced one, on the traced tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from actckpt.rewriting.schedule import CallProgram
from actckpt.signature import described
from actckpt.tracing.calls import GETTER, QUESTIONS, leaves, name_of

TENSOR = object()
_COMPARED = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format, type(Ellipsis),
)  # fmt: skip


@dataclass(slots=True)
class Learned:
    """A call as a run was seen to make it: the function and its arguments, tensors left out."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Following(TorchFunctionMode):
    """Compares every call of a forward with the traced one, and shows it the tensors it may pin.

    Args:
        learned: one entry a call, filled by the first run, which compares what the trace wrote.
        wires: ``id`` of each tensor of known origin -> its wire.
        before, after: told of each call that is as traced, with its tensors.
        leave: told at the first one that is not, and why; nothing is compared from then on.
    """

    def __init__(
        self,
        calls: tuple[CallProgram, ...],
        learned: list[Learned | None],
        wires: dict[int, int],
        before: Callable[[int, CallProgram, list[torch.Tensor]], None],
        after: Callable[[CallProgram, list[torch.Tensor]], None],
        leave: Callable[[int, str], None],
    ) -> None:
        super().__init__()
        self.calls = calls
        self.learned = learned
        self.wires = wires
        self.before = before
        self.after = after
        self.leave = leave
        self.position = 0
        self.left = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.left or func in QUESTIONS or (type(func) is GETTER and func.__name__ == "__get__"):
            return func(*args, **kwargs)
        position = self.position
        given: list[torch.Tensor] = []
        reason = self._difference(position, func, args, kwargs, given)
        if reason:
            self.stop(reason)
            return func(*args, **kwargs)
        self.position = position + 1
        call = self.calls[position]
        if call.draws or call.captures:
            self.before(position, call, given)
        out = func(*args, **kwargs)
        wires, wire = self.wires, call.wire
        if type(out) is torch.Tensor:
            wires[id(out)] = wire
            made = [out]
        else:
            made = list(leaves(out))
            for t in made:
                wires[id(t)] = wire
                wire += 1
        if len(made) != call.results:
            self.stop(f"{name_of(func)} returned {len(made)} tensors, not {call.results}")
        elif call.captures:
            self.after(call, made)
        return out

    def stop(self, reason: str) -> None:
        """The forward is not the traced one from here on."""
        if not self.left:
            self.left = True
            self.leave(self.position, reason)

    def finish(self) -> None:
        """The forward has returned."""
        if self.position < len(self.calls):
            self.stop("it ended earlier")

    def _difference(
        self, position: int, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]
    ) -> str:
        """Why a call is not the traced one; "" if it is. Its tensors are appended to ``given``."""
        if position >= len(self.calls):
            return f"it calls {name_of(func)} after its traced end"
        call, known = self.calls[position], self.learned[position]
        if known is None:
            if described(name_of(func), args, kwargs) != call.text:
                return f"it calls {name_of(func)} with other arguments, or instead of another"
            known = self.learned[position] = Learned(func, _template(args), _template(kwargs))
        if known.func is not func:
            return f"it calls {name_of(func)} instead of {name_of(known.func)}"
        same = len(known.args) == len(args)
        for e, f in zip(known.args, args, strict=False):
            # what most arguments are, without a call: this runs for every call of every step
            if e is TENSOR and isinstance(f, torch.Tensor):
                given.append(f)
            elif e is not f:
                same = same and _same(e, f, given)
        if not same or ((kwargs or known.kwargs) and not _same(known.kwargs, kwargs, given)):
            return f"an argument of {name_of(func)} has another value"
        wires = self.wires
        for t, wire in zip(given, call.sources, strict=True):
            if wire >= 0 and wires.get(id(t)) != wire:
                return f"{name_of(func)} is given another tensor"
        return ""


def _template(x: Any) -> Any:
    """``x`` with a mark in place of each tensor."""
    if isinstance(x, torch.Tensor):
        return TENSOR
    if isinstance(x, list):
        return [_template(i) for i in x]
    if isinstance(x, tuple):
        return tuple(_template(i) for i in x)
    if type(x) is dict:
        return {key: _template(value) for key, value in x.items()}
    if isinstance(x, slice):
        return slice(_template(x.start), _template(x.stop), _template(x.step))
    return x


def _same(expected: Any, found: Any, given: list[torch.Tensor]) -> bool:
    """Whether an argument is as it was; its tensors are appended to ``given``."""
    if expected is TENSOR:
        if isinstance(found, torch.Tensor):
            given.append(found)
            return True
        return False
    kind = type(expected)
    if kind is tuple or kind is list:
        if not isinstance(found, kind) or len(expected) != len(found):
            return False
        return all(e is f or _same(e, f, given) for e, f in zip(expected, found, strict=True))
    if kind is not type(found):
        return False
    if kind is dict:
        return expected.keys() == found.keys() and all(
            _same(e, found[key], given) for key, e in expected.items()
        )
    if kind is slice:
        return (
            _same(expected.start, found.start, given)
            and _same(expected.stop, found.stop, given)
            and _same(expected.step, found.step, given)
        )
    if isinstance(expected, _COMPARED):
        return bool(expected == found)
    return expected is found
