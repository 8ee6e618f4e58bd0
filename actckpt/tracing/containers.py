"""A module's own lists, dicts and sets: what was in them before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def containers(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(attribute, container, what is in it): plain copies, as a kind of its own may refuse any."""
    for name, value in module.__dict__.items():
        for kind in (dict, list, set):
            if isinstance(value, kind):
                yield name, value, kind(value)


def same_items(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects (tensors are not compared by value)."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(k in before and v is before[k] for k, v in now.items())
    if isinstance(now, set):
        return bool(now == before)
    return all(a is b for a, b in zip(now, before, strict=True))
