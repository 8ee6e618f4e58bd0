"""Measured time and workspace of single operations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from actckpt.profiler.arguments import input_bytes, rebuild
from actckpt.profiler.meter import AllocatorMeter
from actckpt.tracing.signature import overload

_LOG = logging.getLogger(__name__)

# operands that exist at a time; a larger one alone
_OPERANDS_BYTES = 256 * 2**20
# what is gone through before each turn: more than what one core's caches hold
_EVICTED_BYTES = 64 * 2**20
_FEWEST_TURNS = 4
_TURNS = 8
_ENOUGH_S = 20e-3
# where the slowest turn took so many times the fastest, there are more
_NOISY = 3.0
_MOST_TURNS = 24
_ENOUGH_NOISY_S = 100e-3
# once is enough
_SLOW_S = 1.0

Place = Callable[[torch.device], torch.device]


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no dispatch modes; random states are as before afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if cuda:
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        yield


def time_ops(signatures: Sequence[str], device: torch.device, place: Place) -> dict[str, float]:
    """Seconds of each operation as a step finds it; those that cannot be run are left out.

    They take turns, each on operands of its own: a step, too, comes to an operation when its
    operands have left the caches, and what it wrote last time has been overwritten. Run over and
    over on the same data, operations that move data take half the time that they take in a step.

    The lower quartile of a few turns, because a busy machine only ever adds time, and adds a lot:
    with one core taken by another process, OpenMP's barriers wait for whole scheduler ticks.
    """
    evicted = torch.zeros(_EVICTED_BYTES, dtype=torch.uint8, device=device)
    found: dict[str, float] = {}
    for group in _groups(signatures):
        found.update(_take_turns(group, device, place, evicted))
    return found


def _groups(signatures: Sequence[str]) -> Iterator[list[str]]:
    """Operations whose operands may all exist at a time."""
    group: list[str] = []
    size = 0
    # of one kind one after the other: their code stays in the caches, as it does in a step
    for signature in sorted(signatures):
        more = input_bytes(signature)
        if group and size + more > _OPERANDS_BYTES:
            yield group
            group, size = [], 0
        group.append(signature)
        size += more
    if group:
        yield group


def _take_turns(
    group: Sequence[str], device: torch.device, place: Place, evicted: torch.Tensor
) -> dict[str, float]:
    clock = _clock(device)
    calls: dict[str, Callable[[], Any]] = {}
    times: dict[str, list[float]] = {}

    def run(signature: str) -> float | None:
        try:
            if signature not in calls:
                op, args, kwargs = rebuild(signature, place, fill=not is_view(signature))
                calls[signature] = partial(op, *args, **kwargs)
            return clock(calls[signature])
        except Exception as error:  # whatever a kernel objects to in made-up arguments
            _LOG.debug("estimated, not measured: %s (%s)", signature[:120], error)
            return None

    for signature in group:
        warm = run(signature)
        if warm is not None:
            times[signature] = [warm] if warm > _SLOW_S else []
        if warm is None or warm > _SLOW_S:
            calls.pop(signature, None)  # its operands are not needed again
    for _ in range(_MOST_TURNS):
        waiting = [s for s in calls if not _enough(times[s])]
        if not waiting:
            break
        evicted.add_(1)  # also where the operations are few or small
        for signature in waiting:
            seconds = run(signature)
            if seconds is not None:
                times[signature].append(seconds)
    return {s: sorted(found)[len(found) // 4] for s, found in times.items() if found}


def _enough(times: list[float]) -> bool:
    noisy = bool(times) and max(times) > _NOISY * min(times)
    turns, seconds = (_MOST_TURNS, _ENOUGH_NOISY_S) if noisy else (_TURNS, _ENOUGH_S)
    return len(times) >= turns or (len(times) >= _FEWEST_TURNS and sum(times) >= seconds)


def workspaces(signatures: Sequence[str], device: torch.device, place: Place) -> list[int]:
    """Bytes of scratch that each operation allocates beside what it returns, in order.

    The operations run once each, in one session of the allocator's meter. 0 where one fails.
    """
    with AllocatorMeter(device, residents=False) as meter:
        for signature in signatures:
            made: Any = None
            result: Any = None
            # it ran before, when it was timed: what fails now is memory, or made-up values
            with suppress(Exception):
                made = rebuild(signature, place, fill=False)
            meter.mark()
            with suppress(Exception):
                result = made[0](*made[1], **made[2])
            meter.mark()
            del made, result
    # per signature: its arguments are made in the first segment, and it runs in the second
    runs = meter.segments[1::2][: len(signatures)]
    return [max(0, run.peak_bytes - max(run.end_bytes, run.start_bytes)) for run in runs]


def dispatch_seconds(device: torch.device) -> float:
    """What a dispatch mode that only calls on adds to one operation, in seconds."""
    x = torch.ones(8, device=device)

    clock = _clock(device)

    def many() -> None:
        for _ in range(100):
            x.add_(0)

    def best() -> float:
        return min(clock(many) for _ in range(8))

    plain = best()
    with _Through():  # type: ignore[no-untyped-call]
        through = best()
    return max(0.0, (through - plain) / 100)


def is_view(signature: str) -> bool:
    """Whether the operation returns a view of an argument, by its schema."""
    name = signature[2 : signature.index('"', 2)]
    try:
        schema = overload(name)._schema
    except AttributeError:
        return False
    return any(r.alias_info and not r.alias_info.is_write for r in schema.returns)


class _Through(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """What runs a call and returns its seconds."""
    return _cuda_clock(device) if device.type == "cuda" else _cpu_clock


def _cpu_clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    del result  # released outside the clock, as in a step where others still hold it
    return seconds


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    def clock(call: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            # a busy stream, so that the host's launch is hidden as it is in a training step
            torch.cuda._sleep(200_000)
            begin.record()
            result = call()
            end.record()
            end.synchronize()
            del result
            return float(begin.elapsed_time(end)) * 1e-3

    return clock
