"""The memory plans of an optimized model, carried over to the process that resumes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.session import session_of
from actckpt.versions import versions


def gather_plans(model: nn.Module) -> dict[str, Any] | None:
    """The plans of an optimized model and the device they were made for; None if there are none."""
    session = session_of(model)
    if session is None:
        return None
    return {"device": _device(), **session.state_dict()}


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
    return "the saved plan is used as it is"
