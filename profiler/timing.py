"""Measured time and workspace of single operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from actckpt.profiler.arguments import UnrunnableError, rebuild
from actckpt.profiler.meter import AllocatorMeter
from actckpt.signature import overload

_ENOUGH_S = 5e-3
_ENOUGH_NOISY_S = 50e-3
_NOISY = 3.0
_MOST_RUNS = 50
_MOST_RUNS_IN_PLACE = 8
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


def time_op(signature: str, device: torch.device, place: Place) -> float:
    """Seconds of the operation alone, see `time_call`.

    Runs for 5 ms, and at least three times (once where a single run takes over a second).

    Raises:
        UnrunnableError: it cannot be made, or it raised; the message says what.
    """
    try:
        op, args, kwargs = rebuild(signature, place, fill=not is_view(signature))
        return time_call(
            lambda: op(*args, **kwargs),
            device,
            most=_MOST_RUNS_IN_PLACE if op._schema.is_mutable else _MOST_RUNS,
        )
    except Exception as error:  # whatever a kernel objects to in made-up arguments
        raise UnrunnableError(f"{type(error).__name__}: {error}") from error


def time_call(call: Callable[[], Any], device: torch.device, *, most: int = _MOST_RUNS) -> float:
    """Lower quartile of the seconds that ``call`` takes, after one warm-up, at most ``most`` runs.

    The lower quartile, because a busy machine only ever adds time, and adds a lot: with one core
    taken by another process, OpenMP's barriers wait for whole scheduler ticks. Ten times as long
    is spent where the slowest run took three times the fastest.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    warm = clock(call)
    if warm > _SLOW_S:
        return clock(call)
    times: list[float] = []
    while len(times) < most:
        noisy = len(times) >= 3 and max(times) > _NOISY * min(times)
        if len(times) >= 3 and sum(times) >= (_ENOUGH_NOISY_S if noisy else _ENOUGH_S):
            break
        times.append(clock(call))
    return sorted(times)[len(times) // 4]


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

    def many() -> None:
        for _ in range(100):
            x.add_(0)

    plain = time_call(many, device)
    with _Through():  # type: ignore[no-untyped-call]
        through = time_call(many, device)
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
