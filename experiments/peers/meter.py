"""The activation peak of a step, from the allocator's own log and nothing of actckpt's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Peak:
    """What one step held beyond what was there when it began.

    Args:
        activation_bytes: highest level without the storages that end as gradients.
        whole_bytes: highest level with them.
        gradient_bytes: of the storages that end as gradients.
    """

    activation_bytes: int
    whole_bytes: int
    gradient_bytes: int


# (address, bytes) in order; bytes are negative for a release
Event = tuple[int, int]


def measured_peak(step: Callable[[], object], parameters: Iterable[nn.Parameter]) -> Peak:
    """The peak of one step that begins without gradients.

    Reads the allocation log of torch's profiler, scratch inside kernels included. Blocks that are
    older than the step and released in it are not known, and count as still there. The caller warms
    up: a first step compiles, or checks its plan.

    Args:
        step: one forward and backward; it leaves the gradients in ``parameters``.
    """
    owners = list(parameters)
    for p in owners:
        p.grad = None
    gc.collect()
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profiler:
        step()
    grads = {p.grad.untyped_storage().data_ptr() for p in owners if p.grad is not None}
    return peak_of(_events(profiler.kineto_results), grads - {0})


def measured_held(run: Callable[[], object]) -> int:
    """Bytes that what ``run`` returns keeps alive, beyond what was there before."""
    gc.collect()
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profiler:
        result = run()
    live: dict[int, int] = {}
    for address, size in _events(profiler.kineto_results):
        if size > 0:
            live[address] = size
        else:
            live.pop(address, None)
    del result
    return sum(live.values())


def peak_of(events: Sequence[Event], gradients: set[int]) -> Peak:
    """The peak of a log, given the addresses that are gradients when it ends.

    Raises:
        ValueError: a gradient was not allocated in the log.
    """
    live: dict[int, int] = {}  # address -> number of the event that allocated it
    for i, (address, size) in enumerate(events):
        if size > 0:
            live[address] = i
        else:
            live.pop(address, None)
    if missing := gradients - live.keys():
        raise ValueError(f"{len(missing)} gradients were not allocated in this step")
    settled = {live[address] for address in gradients}
    level = whole = peak = whole_peak = 0
    sizes: dict[int, tuple[int, bool]] = {}
    for i, (address, size) in enumerate(events):
        # an address that is handed out again was released where the log did not look
        old, was_gradient = sizes.pop(address, (0, False))
        whole -= old
        level -= 0 if was_gradient else old
        if size > 0:
            sizes[address] = size, i in settled
            whole += size
            level += 0 if i in settled else size
        peak, whole_peak = max(peak, level), max(whole_peak, whole)
    return Peak(peak, whole_peak, sum(events[i][1] for i in settled))


def _events(results: Any) -> list[Event]:
    kind = torch._C._profiler._ExtraFields_Allocation
    found: list[tuple[int, int, int]] = []
    stack = list(results.experimental_event_tree())
    while stack:
        event = stack.pop()
        fields = event.extra_fields
        if isinstance(fields, kind):
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        else:
            stack.extend(event.children)
    found.sort(key=lambda e: e[0])
    return [(address, size) for _, address, size in found]
