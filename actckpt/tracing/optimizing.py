"""Which optimizers step a model's parameters, and when they do."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actckpt.errors import ArgumentError, PlanError
from actckpt.tracing.call import tensors
from actckpt.tracing.optimizers import inside, is_optimizer

# their wrappers add no memory, and may not step at all (while gradients are accumulated)
_PROXIES = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


@dataclass(frozen=True, slots=True)
class Optimizing:
    """An optimizer, and when it steps.

    Attributes:
        in_backward: inside backward, as soon as all its gradients have arrived; else after it.
        frees: it lets go of its gradients then.
        temporary_bytes: what a real step of it was seen to take for a while; None if that was not
            measured. It matters where the step cannot be traced.
    """

    optimizer: Any
    in_backward: bool = False
    frees: bool = False
    temporary_bytes: int | None = None

    @property
    def name(self) -> str:
        """Its class, for messages."""
        return type(self.optimizer).__name__

    def parameters(self) -> Iterator[torch.Tensor]:
        """What it steps."""
        return (p for group in self.optimizer.param_groups for p in group["params"])


def optimizers_of(given: Any) -> tuple[Optimizing, ...]:
    """The optimizers that a user gave: one, several, or none.

    Raises:
        ArgumentError: something else was given.
        PlanError: one of them runs the model itself.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping):
        given = given.values()
    single = is_optimizer(given) or isinstance(given, str) or not isinstance(given, Iterable)
    several = [given] if single else list(given)
    for optimizer in several:
        if not is_optimizer(optimizer):
            raise ArgumentError(
                "optimizer must be the optimizer that steps the model, or a list of several; "
                f"found {_described(optimizer)}"
            )
        if needs_closure(optimizer):
            raise PlanError(
                f"{type(optimizer).__name__}.step needs a closure that runs the model, and is "
                "no part of one training step: leave optimizer out. Its memory is then not bounded"
            )
    return tuple(Optimizing(o) for o in outermost(several))


def _described(given: object) -> str:
    """What was given in place of an optimizer, and what to give."""
    kind = "torch.optim.AdamW"
    if isinstance(given, type):
        found, kind = f"the class {given.__name__}", given.__name__
    elif isinstance(given, str):
        found = f"the text {given!r}"
    elif isinstance(given, torch.Tensor):
        found = "parameters"
    else:
        found = type(given).__name__
    return f"{found}. Pass one made of the model's parameters: {kind}(model.parameters(), lr=...)"


def outermost(optimizers: Iterable[Any]) -> list[Any]:
    """Those that no other one of them steps; what only passes on is left out for what it wraps."""
    found = list({id(o): o for o in map(beneath, optimizers)}.values())
    within = {id(x) for o in found for x in inner(o)}
    return [o for o in found if id(o) not in within]


def inner(optimizer: Any) -> list[Any]:
    """The optimizers that another one wraps, itself left out."""
    found: dict[int, Any] = {}
    stack = [optimizer]
    while stack:
        for x in _wrapped(stack.pop()):
            if x is not optimizer and id(x) not in found:
                found[id(x)] = x
                stack.append(x)
    return list(found.values())


def _wrapped(optimizer: Any) -> Iterator[Any]:
    """The optimizers among its attributes, and in lists that are."""
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        several = isinstance(value, (list, tuple, dict))
        for x in (value.values() if isinstance(value, dict) else value) if several else (value,):
            if is_optimizer(x):
                yield x


def beneath(optimizer: Any) -> Any:
    """What a library's wrapper passes on to; most often the optimizer itself."""
    while type(optimizer).__module__.partition(".")[0] in _PROXIES:
        wrapped = getattr(optimizer, "optimizer", None)
        if not is_optimizer(wrapped):
            break
        optimizer = wrapped
    return optimizer


def needs_closure(optimizer: Any) -> bool:
    """Whether the optimizer's step runs the model, as LBFGS's does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def held(optimizer: Any, shared: Iterable[nn.Module] = ()) -> Iterator[torch.Tensor]:
    """The tensors inside an optimizer, each once, but for the parameters that it steps.

    Args:
        shared: modules that are not looked into: the model's.
    """
    seen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    state = getattr(optimizer, "state", None)
    first = [t for s in state.values() for t in tensors(s)] if isinstance(state, Mapping) else []
    for t in (*first, *inside([optimizer], shared)):
        if isinstance(t, torch.Tensor) and id(t) not in seen:
            seen.add(id(t))
            yield t
