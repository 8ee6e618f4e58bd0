"""Follows a forward call by call: whether it is the traced one, on the traced tensors.

Where a plan depends on some stretches of calls only, the others are not even looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

from actckpt.rewriting.learned import Learned
from actckpt.rewriting.schedule import RESTS, CallProgram, PassedCall, Schedule
from actckpt.rewriting.wires import Wires, nothing, root_of
from actckpt.tracing.calls import casting, described_call, is_question, leaves, name_of
from actckpt.tracing.compiled import never_compiled
from actckpt.tracing.transforms import in_transform

_CHANGED = "a tensor is changed in place where it was not"

_is_any_cast = torch._C._is_any_autocast_enabled


class Following(TorchFunctionMode):
    """Compares every call of a forward with the traced one, and shows it the tensors it may pin.

    Args:
        learned: one entry a call, filled by the first run, which compares what the trace wrote,
            and one that stays None.
        whole: follows every call, those between the stretches, too.
        given: the tensors of the first wires.
        before, after: told of each call that is as traced and has something for them, with its
            tensors.
        saving: makes the calls during which autograd saves what is dropped or pinned; told whether
            what they save has been counted before.
        leave: told at the first one that is not, and why; nothing is compared from then on.
    """

    def __init__(
        self,
        schedule: Schedule,
        learned: list[Learned | None],
        whole: bool,
        given: list[torch.Tensor],
        before: Callable[[int, CallProgram, list[torch.Tensor]], None],
        after: Callable[[CallProgram, list[torch.Tensor]], None],
        saving: Callable[[CallProgram, bool, Callable[[], Any]], Any],
        leave: Callable[[int, str], None],
    ) -> None:
        super().__init__()
        calls = self.calls = schedule.calls
        self.stretches = () if whole else schedule.stretches
        self._passed = {} if whole else schedule.passed
        self.learned = learned
        # a wire's tensor while it lives: its ``id`` is another's afterwards
        known = schedule.wires
        self.wires: Wires = known.copy() if self.stretches else [nothing] * len(known)
        # fewer or more than in the trace: those behind are taken for others, and compared
        count = min(calls[0].wire, len(given))
        for wire in schedule.asked if self.stretches else range(count):
            if wire < count:
                self.wires[wire] = ref(given[wire])
        self.before = before
        self.after = after
        self.saving = saving
        self.leave = leave
        # of the next call; that of an entry that stays None while nothing is compared
        self.position = 0
        self.resting = self.left = False
        # calls that have been followed or left out when the stretch ends
        self._until = -1
        # the next stretch, and what must not change until it begins
        self._next = 0
        self._carried: list[tuple[Callable[[], Any], int]] = []
        self._shown = False
        self._below: Any = None

    def __enter__(self) -> Following:
        self._below = _get_current_function_mode()
        if not self.stretches:
            self._show()
        else:
            self._rest(0)
            if self.stretches[0].begins is None:
                self._begin(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            _pop_mode()

    @never_compiled
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # this runs for every call of every step, on code and data that have left the caches since
        # the last one: each line counts
        kwargs = kwargs or {}
        position, wires = self.position, self.wires
        known = self.learned[position]
        if known is None or known.func is not func:
            if self.resting or is_question(func) or in_transform():
                return func(*args, **kwargs)
            if known is None:
                passed = self._passed.get(position)
                if passed is not None:
                    return self._pass(passed, func, args, kwargs)
                known = self._learn(position, func, args, kwargs)
            elif known.func != func:  # a getter is another object every time
                known = None
        if (
            known is None
            or not known.is_made(args, kwargs, wires)
            or ((known.casting or _is_any_cast()) and known.casting != casting())
        ):
            if in_transform():
                return func(*args, **kwargs)
            self.stop(self._difference(known, func, args, kwargs))
            return func(*args, **kwargs)
        self.position = position + 1
        call = known.call
        if known.shown:
            self.before(position, call, known.tensors(args, kwargs))
        if call.saves is None:
            out = func(*args, **kwargs)
        else:
            out = self._save(position, known, func, args, kwargs)
        if type(out) is torch.Tensor and call.results == 1:
            wires[call.wire] = ref(out)
            made = [out]
        else:
            made = leaves(out)
            if len(made) != call.results:
                self.stop(f"{name_of(func)} returned {len(made)} tensors, not {call.results}")
                return out
            for wire, t in enumerate(made, call.wire):
                wires[wire] = ref(t)
        for wire, place in call.roots:
            wires[place] = ref(root_of(made[wire - call.wire]))
        if call.captures:
            self.after(call, made)
        if position + 1 == self._until and not self.left:
            self._rest(position + 1)
        return out

    def _save(self, position: int, known: Learned, func: Any, args: Any, kwargs: Any) -> Any:
        """Makes a call during which autograd saves what is dropped or pinned."""
        wants = known.wanted(args, kwargs)
        if known.wants is not None and known.wants != wants:
            self.position = position
            self.stop(
                f"gradients are wanted of others of the tensors that {name_of(func)} is given"
            )
            return func(*args, **kwargs)
        out = self.saving(known.call, known.wants is not None, lambda: func(*args, **kwargs))
        if not self.left:
            known.wants = wants
        return out

    def _pass(self, passed: PassedCall, func: Any, args: Any, kwargs: Any) -> Any:
        """Makes a call on which nothing depends."""
        self.position += 1
        if passed.first:
            self._note(passed.carried)
        out = func(*args, **kwargs)
        if passed.last and self._is_changed():
            self.stop(_CHANGED)
        return out

    def _note(self, carried: Iterable[int]) -> None:
        """What must not change until the next call that is compared."""
        found = [self.wires[w] for w in carried]
        self._carried = [(of, t._version) for of in found if (t := of()) is not None]

    def _is_changed(self) -> bool:
        return any((t := of()) is not None and t._version != v for of, v in self._carried)

    def turn(self, does: int | None) -> None:
        """A module's forward begins or ends where a stretch is taken up, or calls are not seen."""
        if does is None or self.left:
            return
        if does != RESTS:
            self._begin(does)
        elif self.resting and self._shown and _get_current_function_mode() is self:
            _pop_mode()
            self._shown = False

    def _begin(self, number: int) -> None:
        """Follows a stretch from here on."""
        if number != self._next or not self.resting:
            self.stop("its modules are called in another order")
        elif self._is_changed():
            self.stop(_CHANGED)
        elif not self._show():
            self.stop("it is run under another torch function mode")
        else:
            stretch = self.stretches[number]
            self.position, self._until = stretch.first, stretch.last
            self.resting = False
            self._next = number + 1

    def _rest(self, position: int) -> None:
        """Compares nothing until the next stretch."""
        self._until = position
        self.position = len(self.calls)
        self.resting = True
        if self._next:
            self._note(self.stretches[self._next - 1].carried)

    def _show(self) -> bool:
        """Sees calls from here on; only where no mode of the forward's own would come between."""
        if not self._shown:
            if _get_current_function_mode() is not self._below:
                return False
            _push_mode(self)
            self._shown = True
        return True

    def stop(self, reason: str) -> None:
        """The forward is not the traced one from here on."""
        if not self.left:
            position = self._until if self.resting else self.position
            self.left = self.resting = True
            self.position = len(self.calls)
            self.leave(position, reason)

    def finish(self) -> None:
        """The forward has returned."""
        begun = self._next == len(self.stretches)
        if not begun or (not self.resting and self.position < len(self.calls)):
            self.stop("it ended earlier")

    def _learn(self, position: int, func: Any, args: Any, kwargs: Any) -> Learned | None:
        """The call at a position as it is made now, if that is what the trace wrote."""
        if position == len(self.calls):
            return None
        call = self.calls[position]
        if described_call(func, args, kwargs) != call.text:
            return None
        self.learned[position] = found = Learned.of(func, args, kwargs, call)
        return found

    def _difference(self, known: Learned | None, func: Any, args: Any, kwargs: Any) -> str:
        """Why a call is not the traced one."""
        if self.position >= len(self.calls):
            return f"it calls {name_of(func)} after its traced end"
        if known is None:
            return f"it calls {name_of(func)} with other arguments, or instead of another"
        given = leaves((args, kwargs))
        sources = known.call.sources
        if len(given) == len(sources) and any(
            wire >= 0 and self.wires[wire]() is not t
            for t, wire in zip(given, sources, strict=True)
        ):
            return f"{name_of(func)} is given another tensor"
        if known.casting != casting():
            return f"{name_of(func)} is called under another autocast"
        return f"an argument of {name_of(func)} has another value"
