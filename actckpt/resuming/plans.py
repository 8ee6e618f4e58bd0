"""The memory plans of an optimized model, carried over to the process that resumes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.session.session import session_of
from actckpt.versions import versions


def gather_plans(model: nn.Module) -> dict[str, Any] | None:
    """The plans of an optimized model and the device they were made for; None if there are none."""
    session = session_of(model)
    if session is None:
        return None
    return {"device": _device(), **session.state_dict()}


def gather_inner_plans(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The same of every optimized module within the model, and within what was passed beside it."""
    return {name: gather_plans(module) for name, module in _inner(objects)}


def put_all_plans(
    objects: Mapping[str, Any],
    state: dict[str, Any] | None,
    inner: Mapping[str, Any] | None,
    optimizers: Sequence[torch.optim.Optimizer],
) -> str:
    """As `put_plans`, of the model and every optimized module within what was passed.

    Args:
        inner: what `gather_inner_plans` gave; None is of a version that kept the model's alone.
    """
    found = {"": put_plans(objects["model"], state, optimizers)}
    here = dict(_inner(objects))
    found |= {n: put_plans(m, (inner or {}).get(n), optimizers) for n, m in here.items()}
    gone = [n for n in inner or {} if n not in here]
    found |= dict.fromkeys(gone, "a plan was saved; this module is not optimized")
    said = {name: text for name, text in found.items() if text}
    if len(said) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{name}: {text}" if name else text for name, text in said.items())


def _inner(objects: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the optimized ones but the model itself, each once."""
    seen = {id(objects["model"])}
    for item, x in objects.items():
        if isinstance(x, nn.Module):
            for path, module in x.named_modules():
                if id(module) not in seen and session_of(module) is not None:
                    seen.add(id(module))
                    names = ([] if item == "model" else [item]) + ([path] if path else [])
                    yield ":".join(names), module


def _device() -> str:
    """What the costs that a plan was made by are of."""
    found = versions()
    return found["processor" if found["device"] == "cpu" else "device"]


def put_plans(
    model: nn.Module, state: dict[str, Any] | None, optimizers: Iterable[torch.optim.Optimizer]
) -> str:
    """What happens to the plans: "" for an untouched model, else a sentence for the report.

    A plan that was made for the same step, budget and device is taken as it is. Bits do not depend
    on the plan: where it cannot be taken, another one is made.
    """
    session = session_of(model)
    if session is None:
        return "" if state is None else "a plan was saved; this model is not optimized"
    for optimizer in optimizers:
        # they exist already: no need to wait for their first steps to know what they take
        session.learn(optimizer)
    if state is None:
        return "no plan was saved: the model is planned anew"
    device = _device()
    if state["device"] != device:
        return f"planned anew: the saved plan is for {state['device']}, this is {device}"
    try:
        why = session.load_state_dict(state)
    except PlanError as error:
        why = str(error)
    if why:
        return f"planned anew: {why}"
    return "the saved plan is used for the step that it was made for"
