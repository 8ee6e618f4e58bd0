"""What a wrapper puts before every name of a model: taken off, or put on, where one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from actckpt.resuming.optimizer_names import is_by_name

_WRAPPERS = ("module.", "_orig_mod.")
# items whose keys are names of the model's tensors
_NAMED = ("model", "buffers", "gradients")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that its owner wrapped for training."""
    return _unwrapped(module)[0]


def prefix_of(module: nn.Module) -> str:
    """What the wrappers of a module put before its names, "" where it has none."""
    return _unwrapped(module)[1]


def _unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    prefix = ""
    while True:
        inner, name = getattr(module, "_orig_mod", None), "_orig_mod."
        if isinstance(module, nn.parallel.DistributedDataParallel):
            inner, name = module.module, "module."
        if not isinstance(inner, nn.Module):
            return module, prefix
        module, prefix = inner, prefix + name


def renamed(items: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Items by the names that this module has, with its wrappers or without."""
    inner, here = _unwrapped(module)
    there = _prefix_in(items.get("model", ()), inner.state_dict())
    if here == there:
        return items

    def name(old: str) -> str:
        return here + old.removeprefix(there) if old.startswith(there) else old

    found = dict(items)
    for item in _NAMED:
        if item in items:
            found[item] = _keys(items[item], name)
    for item, state in items.items():
        if is_by_name(state):
            found[item] = {
                **state,
                "state": _keys(state["state"], name),
                "groups": _keys(state["groups"], name),
            }
    versions = items.get("module-versions", {})
    if "model" in versions:
        paths = {f"{path}." if path else "": v for path, v in versions["model"].items()}
        moved = {name(p).rstrip("."): v for p, v in paths.items() if p.startswith(there)}
        found["module-versions"] = {**versions, "model": moved}
    return found


def _prefix_in(names: Iterable[str], inner: Iterable[str]) -> str:
    """What was before every name, and is before none of the model's own."""
    names, own = [*names], [*inner]
    prefix = ""
    while names:
        found = [
            w
            for w in _WRAPPERS
            if all(n.startswith(prefix + w) for n in names)
            and not all(n.startswith(w) for n in own)
        ]
        if not found:
            break
        prefix += found[0]
    return prefix


def _keys(state: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    return type(state)((name(key), value) for key, value in state.items())
