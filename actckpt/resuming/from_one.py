"""What a process on its own saved, as ranks take it: optimizers by name, tensors cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from actckpt.resuming.live_objects import has_groups
from actckpt.resuming.optimizer_names import called

Like = Callable[[str, str, tuple[int, ...]], Any]


def by_names(items: dict[str, Any]) -> dict[str, Any]:
    """The states of optimizers by the names that were saved beside them, where all had one."""
    found = dict(items)
    for item, identity in items["identities"].items():
        groups = identity.get("parameters", [])
        if groups and has_groups(items.get(item)) and all(all(group) for group in groups):
            found[item] = called(items[item], groups)
    return found


def cut(items: dict[str, Any], like: Like) -> dict[str, Any]:
    """The items with this rank's part of every tensor that is cut here."""
    return {item: _cut(state, (), partial(like, item), {}) for item, state in items.items()}


def _cut(
    x: Any,
    path: tuple[str, ...],
    like: Callable[[str, tuple[int, ...]], Any],
    done: dict[int, torch.Tensor],
) -> Any:
    """A value with its tensors cut.

    Args:
        done: by a tensor's id; tied ones are one, under the first of their names.
    """
    if isinstance(x, torch.Tensor):
        if id(x) not in done:
            whole = like("/".join(path), tuple(x.shape))
            done[id(x)] = x if whole is None else _part(x, whole)
        return done[id(x)]
    if isinstance(x, Mapping):
        kind: Any = type(x)
        return kind((k, _cut(v, (*path, str(k)), like, done)) for k, v in x.items())
    if type(x) in (list, tuple):
        return type(x)(_cut(v, (*path, str(n)), like, done) for n, v in enumerate(x))
    return x


def _part(x: torch.Tensor, whole: Any) -> torch.Tensor:
    """A distributed tensor like another one, of what is whole here."""
    (box,) = whole.__create_chunk_list__()
    window = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    return DTensor.from_local(
        x[window].clone(),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
