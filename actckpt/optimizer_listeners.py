"""Who is told of the steps of all optimizers of the process."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from actckpt.tracing.compiled import never_compiled


class Listener(Protocol):
    """Who is told of the steps of all optimizers."""

    def before_step(self, optimizer: Any) -> None: ...

    def after_step(self, optimizer: Any) -> None: ...


LISTENERS: weakref.WeakSet[Listener] = weakref.WeakSet()


def listen(listener: Listener) -> None:
    """Tells ``listener`` of steps, until it is discarded from `LISTENERS`."""
    _listen()
    LISTENERS.add(listener)


@functools.cache
def _listen() -> None:
    """Listens to all optimizers, for good: torch walks through its hooks while they are called."""

    @never_compiled
    def after_step(optimizer: Any, *_: Any) -> None:
        for listener in tuple(LISTENERS):
            listener.after_step(optimizer)

    register_optimizer_step_post_hook(after_step)


@functools.cache
def listen_before() -> None:
    """Tells them before steps, too, from now on."""

    @never_compiled
    def before_step(optimizer: Any, *_: Any) -> None:
        for listener in tuple(LISTENERS):
            listener.before_step(optimizer)

    register_optimizer_step_pre_hook(before_step)
