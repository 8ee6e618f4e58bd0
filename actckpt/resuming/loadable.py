"""Whether what a module gives as its state is what torch's loading would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from actckpt.errors import CheckpointSaveError
from actckpt.resuming.quantized import scale_keys


def check_loadable(name: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises if a resumed run could not load this state into such a module.

    Args:
        name: of the module, for the message.

    Raises:
        CheckpointSaveError: with the first key that nothing would take.
    """
    keys = _untaken(module, state)
    if keys:
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise CheckpointSaveError(
            f"{name}[{keys[0]!r}]{more} is in the state of the {type(module).__name__} and is no "
            "parameter or buffer of it: it can be saved and not be put back. Give the module that "
            "makes it a _load_from_state_dict, or leave it out of the state"
        )


def _untaken(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    if type(module).load_state_dict is not nn.Module.load_state_dict:
        return []
    left = dict.fromkeys(state)
    own: list[str] = []
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        kind = type(part)
        plain = kind._load_from_state_dict.__module__.startswith("torch.")
        if not plain or part._load_state_dict_pre_hooks:
            own.append(prefix)  # it knows itself
            continue
        for key in (*part._parameters, *part._buffers, "_extra_state"):
            left.pop(prefix + key, None)
    if "" in own:
        return []
    left_keys = [key for key in left if not key.startswith(tuple(own))] if own else [*left]
    return [key for key in left_keys if key not in scale_keys(module, state)] if left_keys else []
