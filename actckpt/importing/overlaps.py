"""Tensors of a model that share memory without being the same: parts and other views of others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from actckpt.errors import CheckpointMismatchError
from actckpt.importing.live_tensors import groups_of


def changed_through_others(
    values: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], where: str
) -> tuple[str, ...]:
    """The names of those that have no value, and will not be what they were with those of others.

    Args:
        values: what the live tensors of these names, of their shapes and dtypes, will hold.

    Raises:
        CheckpointMismatchError: not all of them can hold what is theirs.
    """
    first = {names[0]: names for names in groups_of(live)}
    values = {one: values[n] for one, names in first.items() for n in names if n in values}
    changed: set[str] = set()
    for names in _in_common_memory({name: live[name] for name in first}):
        loaded = [name for name in names if name in values]
        if not loaded:
            continue
        memory = torch.zeros(live[names[0]].untyped_storage().nbytes(), dtype=torch.uint8)
        for name in loaded:
            _window(memory, live[name]).copy_(values[name])
        for name in loaded:
            if not torch.equal(_bytes(_window(memory, live[name])), _bytes(values[name])):
                others = " and ".join(other for other in loaded[:4] if other != name)
                raise CheckpointMismatchError(
                    f"{where} has other values for {name} than for {others}, which share memory in "
                    f'this model: leave one out by names={{"{name}": None}} and strict="shapes", '
                    "or load into a model in which they do not. Nothing was changed"
                )
        memory.zero_()
        for name in loaded:
            ones = torch.full_like(_bytes(values[name]), 255).view(live[name].dtype)
            _window(memory, live[name]).copy_(ones.reshape(live[name].shape))
        for name in names:
            if name not in values and _bytes(_window(memory, live[name])).any():
                changed.update(first[name])
    return tuple(name for name in live if name in changed)


def _in_common_memory(live: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of tensors of one storage whose spans on it overlap."""
    spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    for name, x in live.items():
        if isinstance(x, DTensor) or not x.numel():
            continue
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        begin = x.data_ptr()
        where = (x.device, x.untyped_storage().data_ptr())
        spans.setdefault(where, []).append((begin, begin + reach * x.itemsize, name))
    found = []
    for parts in spans.values():
        end, names = 0, [""]
        for begin, its_end, name in sorted(parts):
            if begin < end:
                names.append(name)
            else:
                names = [name]
                found.append(names)
            end = max(end, its_end)
    order = list(live)
    return [sorted(names, key=order.index) for names in found if len(names) > 1]


def _window(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What a tensor sees of its storage, on other memory."""
    made = torch.empty(0, dtype=like.dtype)
    return made.set_(memory.untyped_storage(), like.storage_offset(), like.shape, like.stride())


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
