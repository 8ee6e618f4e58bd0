"""A copy of a model that holds the weights of a table: what libraries save and export.

The user's own model is never switched to evaluation, reverted, moved or merged into.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from actckpt.errors import WeightsExportError
from actckpt.exporting.source import Source, tensors_of
from actckpt.exporting.unwrapping import own_state
from actckpt.resuming.buffers import Buffers
from actckpt.session.reverting import take_off
from actckpt.session.session import session_of


def model_of(source: Source) -> nn.Module:
    """The model that the weights are of; its own may be others.

    Raises:
        WeightsExportError: there is none.
    """
    if source.model is None:
        raise WeightsExportError(
            f"{source.where} has weights and no architecture, which this format needs: pass the "
            "model that they belong to, export(checkpoint, …, model=model)"
        )
    return source.model


def replica_of(source: Source, *, own_memory: bool = False) -> nn.Module:
    """The model with the table's weights, without plan, in evaluation mode, tied as the model is.

    Args:
        own_memory: the weights are copies, to be changed; otherwise they are the table's own.

    Raises:
        WeightsExportError: there is no model, or it cannot be copied.
    """
    model = model_of(source)
    where = type(model).__name__
    loose = own_state(Buffers(model).state_dict(), where)
    memo: dict[int, Any] = {}
    for name, own in tensors_of(model).items():
        weight = source.table.weights.get(name)
        if weight is None and name in loose:
            continue  # an early version's checkpoint has none; what a class makes of it counts
        if weight is None:
            raise WeightsExportError(
                f"{source.where} lacks {name}, which {where} has: pass model= as it was trained"
            )
        if id(own) in memo:
            continue
        tensor = weight.tensor.clone() if own_memory else weight.tensor
        if isinstance(own, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=own.requires_grad)
        memo[id(own)] = tensor
    try:
        made = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise WeightsExportError(
            f"{where} cannot be copied, which this format needs so that your model stays as it "
            f'is: {error}. Take what it names off the model, or export format="safetensors"'
        ) from error
    for module in list(made.modules()):
        if session_of(module) is not None:
            take_off(module)
    for module in list(made.modules()):
        for name, child in module.named_children():
            inner = getattr(child, "_orig_mod", None)
            if isinstance(inner, nn.Module):
                setattr(module, name, inner)
    return made.eval()
