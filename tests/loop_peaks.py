"""The peak of a user's own loop, by the allocator; and loops of planned and untouched models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from actckpt.profiler.census import storages, tensors
from actckpt.profiler.meter import AllocatorMeter
from tests.exact import same_bits


def resident_bytes(*things: Any) -> int:
    """Bytes of the storages in modules, optimizers, and nests of tensors."""
    found: list[torch.Tensor] = []
    for x in things:
        if isinstance(x, nn.Module):
            found += [*x.parameters(), *x.buffers()]
            found += [p.grad for p in x.parameters() if p.grad is not None]
        elif isinstance(x, torch.optim.Optimizer):
            found += tensors(list(x.state.values()))
        else:
            found += tensors([x])
    return sum({s._cdata: s.nbytes() for t in found for s in storages(t)}.values())


def metered() -> AllocatorMeter:
    """Meanwhile the allocator on the CPU is asked for the peak above what there was."""
    return AllocatorMeter("cpu", residents=False)


def loop_peak(step: Callable[[], object], *residents: Any) -> int:
    """Highest bytes allocated while one step of a loop runs, ``residents`` included."""
    before = resident_bytes(*residents)
    with metered() as meter:
        step()
    return before + meter.peak_bytes


def weights(modules: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer."""
    return {
        f"{n} {name}": t.detach().clone()
        for n, module in enumerate(modules)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    }


def other_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs in a bit."""
    assert a.keys() == b.keys()
    return [name for name, t in a.items() if not same_bits(t, b[name])]
