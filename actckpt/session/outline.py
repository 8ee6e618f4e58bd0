"""A batch without its memory: enough to plan for it again when it is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from actckpt.tracing.call import map_tensors
from actckpt.tracing.outlined import may_outline, outlined

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def outline(tree: Any) -> Any:
    """The same nesting with meta tensors that `FakeWorld` takes for those of the batch.

    Returns:
        None where something in it is no tensor, number, text or container of these: it might hold
        any amount of memory, and could change until then.
    """
    if not _is_plain(tree):
        return None
    made: dict[int, torch.Tensor] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = outlined(tensor)
        return made[id(tensor)]

    return map_tensors(tree, of)


def _is_plain(tree: Any) -> bool:
    if isinstance(tree, torch.Tensor):
        return may_outline(tree)
    if tree is None or isinstance(tree, _PLAIN):
        return True
    if isinstance(tree, Mapping):
        return all(map(_is_plain, tree.values()))
    if isinstance(tree, (list, tuple)):
        return all(map(_is_plain, tree))
    if is_dataclass(tree) and not isinstance(tree, type):
        return all(_is_plain(getattr(tree, f.name, None)) for f in fields(tree))
    return False
