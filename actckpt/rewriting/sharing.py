"""Modules that two optimized models have in common."""

from __future__ import annotations

import gc
import weakref

from torch import nn

from actckpt.errors import PlanError
from actckpt.rewriting.installing import installed

_OPTIMIZED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def note_optimized(model: nn.Module) -> None:
    """Remembers a model with a plan, or one that waits for its first forward to make one."""
    _OPTIMIZED.add(model)


def refuse_shared(model: nn.Module) -> None:
    """Refuses a model that has modules with weights in common with another optimized one.

    A module without weights (the ``nn.Identity`` of a default argument, a table of positions) may
    be a part of both.

    Raises:
        PlanError: it is a part of the other, or the other of it, or both have such a module.
    """
    reason = _shared(model)
    if reason:
        gc.collect()  # a model that nobody has any more may only wait to be collected
        reason = _shared(model)
    if reason:
        raise PlanError(reason)


def _shared(model: nn.Module) -> str:
    """Why a model cannot have a plan of its own beside the others; "" if it can."""
    mine = {id(m): path for path, m in model.named_modules()}
    for other in list(_OPTIMIZED):
        if other is model or installed(other) is None:
            continue
        kind = type(other).__name__
        if id(other) in mine:
            return (
                f"{mine[id(other)]} is in the middle of another plan: it was optimized by itself. "
                "Call actckpt.revert on it first, or optimize only it"
            )
        for path, module in other.named_modules():
            if id(module) not in mine or next(module.parameters(), None) is None:
                continue
            if module is model:
                return (
                    f"this module is in the middle of another plan: it is {path} of a {kind} that "
                    "was optimized. Call actckpt.revert on that one first, or optimize only it"
                )
            return (
                f"{mine[id(module)]} is in the middle of another plan: it is {path} of a {kind} "
                "that was optimized, too. Call actckpt.revert on that one first, or optimize a "
                "module that holds both models, or the one that they share"
            )
    return ""
