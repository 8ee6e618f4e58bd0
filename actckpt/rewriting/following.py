"""Follows a forward call by call: whether it is the traced one, on the traced tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch.overrides import TorchFunctionMode

from actckpt.rewriting.schedule import CallProgram
from actckpt.tracing.calls import casting, described_call, is_question, leaves, name_of

_COMPARED = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format, type(Ellipsis),
)  # fmt: skip


_is_any_cast = torch._C._is_any_autocast_enabled


def _nothing() -> None:
    """The tensor of a wire that no call has returned yet."""


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


class Following(TorchFunctionMode):
    """Compares every call of a forward with the traced one, and shows it the tensors it may pin.

    Args:
        learned: one entry a call, filled by the first run, which compares what the trace wrote,
            and one that stays None.
        given: the tensors of the first wires.
        before, after: told of each call that is as traced and has something for them, with its
            tensors.
        saving: makes the calls during which autograd saves what is dropped or pinned.
        leave: told at the first one that is not, and why; nothing is compared from then on.
    """

    def __init__(
        self,
        calls: tuple[CallProgram, ...],
        learned: list[Learned | None],
        given: list[torch.Tensor],
        before: Callable[[int, CallProgram, list[torch.Tensor]], None],
        after: Callable[[CallProgram, list[torch.Tensor]], None],
        saving: Callable[[CallProgram, Callable[[], Any]], Any],
        leave: Callable[[int, str], None],
    ) -> None:
        super().__init__()
        self.calls = calls
        self.learned = learned
        # a wire's tensor while it lives: its ``id`` is another's afterwards
        self.wires: list[Callable[[], Any]] = [ref(t) for t in given]
        last = calls[-1]
        self.wires += [_nothing] * (last.wire + last.results - len(given))
        self.before = before
        self.after = after
        self.saving = saving
        self.leave = leave
        self.position = 0
        self.left = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # this runs for every call of every step, on code and data that have left the caches since
        # the last one: each line counts
        kwargs = kwargs or {}
        position, wires = self.position, self.wires
        known = self.learned[position]
        if known is None or known.func is not func:
            if self.left or is_question(func):
                return func(*args, **kwargs)
            if known is None:
                known = self._learn(position, func, args, kwargs)
            elif known.func != func:  # a getter is another object every time
                known = None
        if (
            known is None
            or not _is_same(known, args, kwargs, wires)
            or ((known.casting or _is_any_cast()) and known.casting != casting())
        ):
            self.stop(self._difference(known, func, args, kwargs))
            return func(*args, **kwargs)
        self.position = position + 1
        call = known.call
        if known.shown:
            self.before(position, call, list(leaves((args, kwargs))))
        if call.saves is None:
            out = func(*args, **kwargs)
        else:
            out = self.saving(call, lambda: func(*args, **kwargs))
        made = [out] if type(out) is torch.Tensor else list(leaves(out))
        if len(made) != call.results:
            self.stop(f"{name_of(func)} returned {len(made)} tensors, not {call.results}")
            return out
        for wire, t in enumerate(made, call.wire):
            wires[wire] = ref(t)
        if call.captures:
            self.after(call, made)
        return out

    def stop(self, reason: str) -> None:
        """The forward is not the traced one from here on."""
        if not self.left:
            self.left = True
            position, self.position = self.position, len(self.calls)
            self.leave(position, reason)

    def finish(self) -> None:
        """The forward has returned."""
        if self.position < len(self.calls):
            self.stop("it ended earlier")

    def _learn(self, position: int, func: Any, args: Any, kwargs: Any) -> Learned | None:
        """The call at a position as it is made now, if that is what the trace wrote."""
        if position == len(self.calls):
            return None
        call = self.calls[position]
        if described_call(func, args, kwargs) != call.text:
            return None
        sources = iter(call.sources)
        given, named = _template(args, sources), _template(kwargs, sources)
        shown = call.draws or not all(c.result for c in call.captures)
        self.learned[position] = found = Learned(func, given, named, call, shown, casting())
        return found

    def _difference(self, known: Learned | None, func: Any, args: Any, kwargs: Any) -> str:
        """Why a call is not the traced one."""
        if self.position >= len(self.calls):
            return f"it calls {name_of(func)} after its traced end"
        if known is None:
            return f"it calls {name_of(func)} with other arguments, or instead of another"
        given = list(leaves((args, kwargs)))
        sources = known.call.sources
        if len(given) == len(sources) and any(
            wire >= 0 and self.wires[wire]() is not t
            for t, wire in zip(given, sources, strict=True)
        ):
            return f"{name_of(func)} is given another tensor"
        if known.casting != casting():
            return f"{name_of(func)} is called under another autocast"
        return f"an argument of {name_of(func)} has another value"


def _template(x: Any, sources: Iterator[int]) -> Any:
    """``x`` with a mark in place of each tensor."""
    if isinstance(x, torch.Tensor):
        return Wired(next(sources))
    if isinstance(x, list):
        return [_template(i, sources) for i in x]
    if isinstance(x, tuple):
        return tuple(_template(i, sources) for i in x)
    if type(x) is dict:
        return {key: _template(value, sources) for key, value in x.items()}
    if isinstance(x, slice):
        return slice(*(_template(i, sources) for i in (x.start, x.stop, x.step)))
    return x


def _is_same(known: Learned, args: Any, kwargs: Any, wires: list[Callable[[], Any]]) -> bool:
    """Whether the arguments of a call are those that are known, on the same tensors."""
    if len(known.args) != len(args) or len(known.kwargs) != len(kwargs):
        return False
    for e, f in zip(known.args, args, strict=True):
        # what most arguments are, without a call; no wire gives None where a tensor is expected,
        # and the last one is not wire -1
        if e is f or (type(e) is Wired and e.wire >= 0 and wires[e.wire]() is f is not None):
            continue
        if not _same(e, f, wires):
            return False
    for key, e in known.kwargs.items():
        f = kwargs.get(key, _nothing)
        if e is not f and not _same(e, f, wires):
            return False
    return True


def _same(expected: Any, found: Any, wires: list[Callable[[], Any]]) -> bool:
    """Whether an argument is as it was, its tensors included."""
    kind = type(expected)
    if kind is Wired:
        if expected.wire < 0:
            return isinstance(found, torch.Tensor)
        return found is not None and wires[expected.wire]() is found  # else of a dead one
    if kind is tuple or kind is list:
        if not isinstance(found, kind) or len(expected) != len(found):
            return False
        return all(e is f or _same(e, f, wires) for e, f in zip(expected, found, strict=True))
    if kind is not type(found):
        return False
    if kind is dict:
        return expected.keys() == found.keys() and all(
            _same(e, found[key], wires) for key, e in expected.items()
        )
    if kind is slice:
        return all(
            _same(getattr(expected, end), getattr(found, end), wires)
            for end in ("start", "stop", "step")
        )
    if isinstance(expected, _COMPARED):
        return bool(expected == found)
    return expected is found
