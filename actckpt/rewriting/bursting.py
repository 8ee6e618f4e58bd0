"""Runs the operations of a burst, below autograd, on the tensors that the forward had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from actckpt.rewriting.ambient import set_generator_states
from actckpt.rewriting.schedule import BurstProgram, Schedule, StepProgram
from actckpt.rewriting.wires import Window
from actckpt.tracing.signature import decode

# the windows of one storage that exist, by value
Views = dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for the tensor argument ``number`` of an operation."""

    number: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """A step ready to be run.

    Attributes:
        args, kwargs: with `Slot` in place of tensors.
        direct: (position, storage, value) of each argument that is a tensor.
        nested: positions of arguments with tensors inside.
        outputs: (storage, value) of each result.
    """

    step: StepProgram
    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    direct: tuple[tuple[int, int, int], ...]
    nested: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]


def decoded(step: StepProgram, windows: dict[int, Window]) -> Decoded:
    """What a step does, looked up once."""
    count = -1

    def make(*_: Any) -> Slot:
        nonlocal count
        count += 1
        return Slot(count)

    func, args, kwargs = decode(step.signature, make)
    for position in step.blank:
        args[position] = None
    values = [(n, step.inputs[a.number]) for n, a in enumerate(args) if isinstance(a, Slot)]
    return Decoded(
        step,
        func,
        args,
        kwargs,
        direct=tuple((n, windows[value][0], value) for n, value in values),
        nested=tuple(n for n, a in enumerate(args) if isinstance(a, list)),
        outputs=tuple((windows[value][0], value) for value in step.outputs),
    )


def run_steps(
    schedule: Schedule,
    burst: BurstProgram,
    found: dict[int, Views],
    states: dict[int, Any],
    limit: int | None,
    cache: dict[int, Decoded],
) -> None:
    """Runs a burst; ``found`` holds what it begins with, and afterwards what is to stay.

    Args:
        states: the random state before each call that draws.
        limit: operations from here on are left out; None runs all.
        cache: decoded steps by ``id``; the schedule keeps them alive.
    """
    windows = schedule.windows
    # the trace has its casts as operations, wherever backward was called; an LSTM's kernel asks
    # whether gradients are enabled, and they were
    with (
        torch._C._DisableAutocast(),
        torch._C._AutoDispatchBelowAutograd(),
        torch.enable_grad(),
    ):
        for step in burst.steps:
            if limit is not None and step.op >= limit:
                break
            if step.draws >= 0:
                set_generator_states(states[step.draws])
            call = cache.get(id(step))
            if call is None:
                call = cache[id(step)] = decoded(step, windows)
            _run(call, found, windows)
            for sid in step.done:
                found.pop(sid, None)


def _run(call: Decoded, found: dict[int, Views], windows: dict[int, Window]) -> None:
    args = call.args.copy()
    for position, sid, value in call.direct:
        views = found[sid]
        tensor = views.get(value)
        args[position] = view_of(views, value, windows) if tensor is None else tensor
    kwargs = call.kwargs
    if call.nested or kwargs:
        inputs = call.step.inputs

        def tensor_of(slot: Slot) -> torch.Tensor:
            value = inputs[slot.number]
            return view_of(found[windows[value][0]], value, windows)

        for position in call.nested:
            args[position] = _filled(args[position], tensor_of)
        kwargs = _filled(kwargs, tensor_of)
    out = call.func(*args, **kwargs)
    results = (out,) if isinstance(out, torch.Tensor) else _flat(out)
    for (sid, value), result in zip(call.outputs, results, strict=True):
        found.setdefault(sid, {})[value] = result


def view_of(views: Views, value: int, windows: dict[int, Window]) -> torch.Tensor:
    """The window ``value`` of a storage of which others exist."""
    tensor = views.get(value)
    if tensor is None:
        known, base = next(iter(views.items()))
        _, shape, stride, offset, _ = windows[value]
        # a batch may lie at another place of a larger tensor than the traced one did
        moved = int(base.storage_offset()) - windows[known][3]
        tensor = base.as_strided(shape, stride, offset + moved)
    return tensor


def _filled(x: Any, tensor_of: Any) -> Any:
    if isinstance(x, Slot):
        return tensor_of(x)
    if isinstance(x, list):
        return [_filled(i, tensor_of) for i in x]
    if isinstance(x, dict):
        return {key: _filled(i, tensor_of) for key, i in x.items()}
    return x


def _flat(out: Any) -> tuple[torch.Tensor, ...]:
    found: list[torch.Tensor] = []
    for o in out:
        if isinstance(o, torch.Tensor):
            found.append(o)
        elif isinstance(o, (list, tuple)):
            found.extend(_flat(o))
    return tuple(found)
