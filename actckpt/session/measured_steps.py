"""What the steps take for a while that cannot be traced: it is measured when they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from actckpt.profiler.meter import AllocatorMeter
from actckpt.session.optimizer_listeners import listen_before


@dataclass(slots=True)
class _OpenMeter:
    """A measurement under way: of which optimizer's step, by id, and how many calls deep it is."""

    optimizer: int
    meter: AllocatorMeter
    depth: int = 0


class MeasuredSteps:
    """Meters round the steps of the optimizers that were asked for, by identity."""

    def __init__(self) -> None:
        self._wanted: set[int] = set()
        self._open: _OpenMeter | None = None

    def want(self, optimizers: Iterable[Any]) -> None:
        """Measures their steps from now on."""
        self._wanted.update(map(id, optimizers))

    def listen(self) -> None:
        """Has steps told before they begin, where some are to be measured."""
        if self._wanted:
            listen_before()

    def enough(self, optimizers: Iterable[Any]) -> None:
        """Measures their steps no more."""
        self._wanted.difference_update(map(id, optimizers))

    def begin(self, optimizer: Any) -> None:
        """A step begins: measures it, if it is one of those."""
        if id(optimizer) not in self._wanted:
            return
        if self._open is not None:
            # a step that calls the one of its base class begins twice
            self._open.depth += self._open.optimizer == id(optimizer)
            return
        device = next((p.device for g in optimizer.param_groups for p in g["params"]), None)
        if device is None or device.type not in ("cpu", "cuda") or _is_profiling():
            return
        meter = AllocatorMeter(device)
        meter.__enter__()
        self._open = _OpenMeter(id(optimizer), meter)

    def end(self, optimizer: Any) -> AllocatorMeter | None:
        """What was measured of a step that has ended; None if it was not."""
        if self._open is None or self._open.optimizer != id(optimizer):
            return None
        if self._open.depth:
            self._open.depth -= 1
            return None
        return self.abandon()

    def abandon(self) -> AllocatorMeter | None:
        """Ends a measurement, which an error in the step may have left open."""
        if self._open is None:
            return None
        meter, self._open = self._open.meter, None
        meter.__exit__(None, None, None)
        return meter


def _is_profiling() -> bool:
    return bool(torch._C._autograd._profiler_enabled())
