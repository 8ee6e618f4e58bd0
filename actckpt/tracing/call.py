"""How a batch is passed to a model's forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from actckpt.errors import ArgumentError

LossFn = Callable[..., torch.Tensor]


class Call:
    """The arguments of one forward call: ``model(*args, **kwargs)``."""

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def of(cls, batch: Any) -> Call:
        """The call that a batch stands for.

        Args:
            batch: a tensor (one positional argument), a tuple (positional), a mapping (keyword), or
                a `Call`.

        Raises:
            ArgumentError: the batch is none of these.
        """
        if isinstance(batch, Call):
            return batch
        if isinstance(batch, torch.Tensor):
            return cls(batch)
        if isinstance(batch, tuple):
            return cls(*batch)
        if isinstance(batch, Mapping):
            return cls(**batch)
        raise ArgumentError(
            f"batch must be a tensor, a tuple (positional arguments), a dict (keyword arguments) "
            f"or actckpt.Call(*args, **kwargs); found {type(batch).__name__}"
        )


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples, mappings and dataclasses, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, Call):
        yield from tensors(tree.args)
        yield from tensors(tree.kwargs)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for f in fields(tree):
            yield from tensors(getattr(tree, f.name, None))


def map_tensors(
    tree: Any, fn: Callable[[Any], Any], kind: type | tuple[type, ...] = torch.Tensor
) -> Any:
    """The same nesting with ``fn`` applied to each tensor; everything else is shared.

    Args:
        kind: the class of leaves to map, if not tensors.
    """
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, tuple):
        items = [map_tensors(i, fn, kind) for i in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(i, fn, kind) for i in tree]
    if isinstance(tree, Call):
        return Call(*map_tensors(tree.args, fn, kind), **map_tensors(tree.kwargs, fn, kind))
    if is_dataclass(tree) and not isinstance(tree, type):
        clone = copy.copy(tree)
        for f in fields(tree):
            if hasattr(tree, f.name):
                object.__setattr__(clone, f.name, map_tensors(getattr(tree, f.name), fn, kind))
        if isinstance(clone, dict):  # a ModelOutput is both
            for key, value in tree.items():  # type: ignore[attr-defined]
                dict.__setitem__(clone, key, map_tensors(value, fn, kind))
        return clone
    if isinstance(tree, Mapping):
        mapped = {k: map_tensors(v, fn, kind) for k, v in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    return tree
