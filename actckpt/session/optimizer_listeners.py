"""Who is told of the steps of all optimizers of the process."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
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


LISTENERS: weakref.WeakKeyDictionary[Listener, None] = weakref.WeakKeyDictionary()


def listen(listener: Listener) -> None:
    """Tells ``listener`` of steps, after all that listen already, until it is taken out of
    `LISTENERS`; called again, after those that came since.
    """
    _listen()
    LISTENERS.pop(listener, None)
    LISTENERS[listener] = None


def _listening() -> Iterator[Listener]:
    # by the references, in a tenth of the time of the set itself: every step asks
    for ref in LISTENERS.keyrefs():
        listener = ref()
        if listener is not None:
            yield listener


@functools.cache
def _listen() -> None:
    """Listens to all optimizers, for good: torch walks through its hooks while they are called."""

    @never_compiled
    def after_step(optimizer: Any, *_: Any) -> None:
        for listener in _listening():
            listener.after_step(optimizer)

    register_optimizer_step_post_hook(after_step)


@functools.cache
def listen_before() -> None:
    """Tells them before steps, too, from now on."""

    @never_compiled
    def before_step(optimizer: Any, *_: Any) -> None:
        for listener in _listening():
            listener.before_step(optimizer)

    register_optimizer_step_pre_hook(before_step)
