"""A plan taken off a model."""

from __future__ import annotations

from torch import nn

from actckpt.rewriting.installing import uninstall
from actckpt.session.in_use import forget
from actckpt.session.session import session_of


def take_off(model: nn.Module) -> None:
    """Makes a model what it was before it was optimized; nothing if it was not."""
    session = session_of(model)
    if session is not None:
        session.close()
    forget(model)
    uninstall(model)
