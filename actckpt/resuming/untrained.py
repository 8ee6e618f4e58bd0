"""Which tensors of a state may be such as no step changes: those of modules that nobody trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from actckpt.checkpoint.encoding import Encoded


def with_frozen(encoded: Mapping[str, Encoded], objects: Mapping[str, Any]) -> dict[str, Encoded]:
    """The same items, told which of their tensors may be frozen; all as they are where no
    parameter is.

    Of the model, parameters that ask for no gradient are said to be. Those of other modules may be
    an average that follows each step, and buffers change as they like: of these it is to be seen.
    """
    modules = {item: x for item, x in objects.items() if isinstance(x, nn.Module)}
    parameters = {
        item: dict(module.named_parameters(remove_duplicate=False))
        for item, module in modules.items()
    }
    if all(p.requires_grad for found in parameters.values() for p in found.values()):
        return dict(encoded)
    told = dict(encoded)
    for item, named in parameters.items():
        flags = {}
        for name in encoded[item].tensors:
            # of a tensor that is made of others, the parts
            parameter = named.get(name.split("/")[0])
            if parameter is None or not parameter.requires_grad:
                flags[name] = item == "model" and parameter is not None
        told[item] = replace(encoded[item], frozen=flags)
    for item in ("buffers", "other-buffers"):
        told[item] = replace(encoded[item], frozen=dict.fromkeys(encoded[item].tensors, False))
    return told
