"""What is inside an optimizer, by identity and by bits: the same before and after a public call."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch

Contents = dict[str, tuple[int, Any]]


def contents(optimizer: object) -> Contents:
    """Path -> (identity, what is there) of every object that can be reached from ``optimizer``."""
    found: Contents = {}
    seen: set[int] = set()

    def visit(path: str, x: Any) -> None:
        found[path] = (id(x), _summary(x))
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            return
        if isinstance(x, Mapping):
            for n, (key, value) in enumerate(x.items()):
                visit(f"{path}.key{n}", key)
                visit(f"{path}[{n}]", value)
        elif isinstance(x, (list, tuple)) or type(x).__name__ == "deque":
            for n, value in enumerate(x):
                visit(f"{path}[{n}]", value)
        elif isinstance(x, types.MethodType):
            visit(f"{path}.self", x.__self__)
        if isinstance(getattr(x, "__dict__", None), dict) and not isinstance(
            x, (type, types.FunctionType, types.ModuleType, types.MethodType)
        ):
            for name, value in vars(x).items():
                visit(f"{path}.{name}", value)

    visit("optimizer", optimizer)
    return found


def _summary(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        # compared by bits: a copy, as the tensor itself would change along
        return (x._version, x.requires_grad, tuple(x.flatten().tolist()))
    if isinstance(x, (int, float, str, bool, type(None))):
        return x
    return type(x).__name__


def changes(before: Contents, after: Contents) -> list[str]:
    """What differs, in words; [] if nothing does."""
    return [
        f"{path}: {before.get(path)} -> {after.get(path)}"
        for path in {**before, **after}
        if before.get(path) != after.get(path)
    ]
