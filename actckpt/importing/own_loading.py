"""What modules do themselves when a state dict is loaded, which copying tensors does not do."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from actckpt.importing.source import EXTRA_STATE

# hooks of these rename what their older versions wrote: there names do not agree, which is said
_RENAMING = ("torch", "torchvision", "torchmetrics", "transformers", "lightning", "peft")


def extra_states(model: nn.Module) -> tuple[str, ...]:
    """The names under which modules keep what is no tensor in a state dict."""
    return tuple(
        f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
        and not type(module).get_extra_state.__module__.startswith("torch.")
    )


def own_loading(model: nn.Module, live: Collection[str]) -> tuple[str, ...]:
    """The names of modules with tensors that load by hooks, or by a method of their own."""
    return tuple(
        name or "the model itself"
        for name, module in model.named_modules()
        if not all(_is_renaming(code) for code in _code_of(module))
        and any(x.startswith(f"{name}." if name else "") for x in live)
    )


def _code_of(module: nn.Module) -> list[Callable[..., Any]]:
    hooks = (
        *module._load_state_dict_pre_hooks.values(),
        *module._load_state_dict_post_hooks.values(),
    )
    # torch wraps some, and others are partial
    plain = [getattr(hook, "hook", hook) for hook in hooks]
    return [type(module)._load_from_state_dict, *(getattr(hook, "func", hook) for hook in plain)]


def _is_renaming(code: Callable[..., Any]) -> bool:
    return (getattr(code, "__module__", None) or "").partition(".")[0] in _RENAMING
