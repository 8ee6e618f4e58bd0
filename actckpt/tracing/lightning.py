"""Lightning's modules: what a trainer calls of them is not the forward but ``training_step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.tracing.call import Call

TRAINING_STEP = "training_step"
_PACKAGES = ("lightning", "pytorch_lightning")


def is_lightning(model: nn.Module) -> bool:
    """Whether it is a LightningModule with a ``training_step`` of its own."""
    bases = [c for c in type(model).__mro__ if c.__name__ == "LightningModule"]
    base = next((c for c in bases if c.__module__.partition(".")[0] in _PACKAGES), None)
    if base is None:
        return False
    return getattr(type(model), TRAINING_STEP) is not getattr(base, TRAINING_STEP)


def refuse_manual(model: nn.Module) -> None:
    """Refuses a ``training_step`` that runs backward and optimizers itself.

    Raises:
        PlanError: it is one.
    """
    if not getattr(model, "automatic_optimization", True):
        raise PlanError(
            f"{type(model).__name__}.training_step optimizes manually: it runs backward and its "
            "optimizers itself, and is more than the forward of one step. Optimize the module "
            "inside that it calls, as in actckpt.optimize(lit.net, budget_gb); a trainer keeps "
            "checkpoints of it with MemoryBudget(None, checkpoints=...)"
        )


def training_call(model: nn.Module, batch: Any) -> Call:
    """The call that a trainer makes for a batch of its loader.

    Args:
        batch: what the loader gives, in whatever nesting, or the `Call` itself.
    """
    if isinstance(batch, Call):
        return batch
    wanted = inspect.signature(getattr(model, TRAINING_STEP)).parameters.values()
    numbered = "batch_idx" in (p.name for p in wanted) or len(wanted) > 1
    return Call(batch, 0) if numbered else Call(batch)


def of_the_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a ``training_step`` without the numbers of batch and loader."""
    return args[:1] if args else (kwargs.get("batch", kwargs),)


@contextmanager
def without_logging(model: nn.Module) -> Iterator[None]:
    """Lets ``self.log`` do nothing: what it was given would stay with the trainer."""
    with _in_place(model, lambda name: _ignore):
        yield


class Unseen:
    """What ``self.log`` did while it was no part of a plan: nodes of autograd's graph."""

    def __init__(self) -> None:
        self.nodes = 0


@contextmanager
def unseen_logging(model: nn.Module, done: Unseen) -> Iterator[None]:
    """Lets ``self.log`` do what it does unseen by torch function modes: it is no part of a plan."""

    def unseen(name: str) -> Callable[..., Any]:
        log = getattr(model, name)

        def logged(*args: Any, **kwargs: Any) -> Any:
            first = next_node()
            try:
                with torch._C.DisableTorchFunction():
                    return log(*args, **kwargs)
            finally:
                done.nodes += next_node() - first

        return logged

    with _in_place(model, unseen):
        yield


@contextmanager
def _in_place(model: nn.Module, of: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    before = {name: model.__dict__[name] for name in _LOGS if name in model.__dict__}
    model.__dict__.update({name: of(name) for name in _LOGS})
    try:
        yield
    finally:
        for name in _LOGS:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


# the number of the next node of autograd's graph in this thread
next_node: Callable[[], int] = torch._C._autograd._get_sequence_nr
_LOGS = ("log", "log_dict")


def _ignore(*_: Any, **__: Any) -> None:
    """Takes anything."""
