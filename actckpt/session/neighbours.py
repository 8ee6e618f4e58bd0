"""Other models on the device of a planned one: what they take in its step is not planned for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from actckpt.object_walk import alive
from actckpt.profiler.census import sizes
from actckpt.rewriting.installing import installed

# of the planned model's weights: less is a metric or the like
_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A model beside the planned one.

    Attributes:
        name: of its class.
        held_bytes: its parameters and buffers on the device that are not the planned model's, too.
        frozen: nothing of it is trained.
    """

    name: str
    held_bytes: int
    frozen: bool


def neighbours(model: nn.Module) -> list[Neighbour]:
    """Models with weights on the device of this one that are no part of it, nor optimized.

    Those that hold each other are one; of one that holds the model, too, what stands beside it
    there. Goes through all objects of the process: tens of milliseconds.
    """
    first = next(model.parameters(), None)
    if first is None:
        return []
    own = {id(m) for m in model.modules()}
    weights = sizes(_weights(model))
    least = _SHARE * sum(weights.values())
    found = []
    todo = _outermost()
    while todo:
        other = todo.pop()
        if id(other) in own or installed(other) is not None:
            continue
        if any(id(m) in own for m in other.modules()):
            todo += [m for m in other._modules.values() if m is not None]
            continue
        here = sizes(t for t in _weights(other) if t.device == first.device and not _is_fake(t))
        held = sum(size for address, size in here.items() if address not in weights)
        if held > least:
            frozen = not any(p.requires_grad for p in other.parameters())
            found.append(Neighbour(type(other).__name__, held, frozen))
    return sorted(found, key=lambda n: (not n.frozen, -n.held_bytes, n.name))


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _outermost() -> list[nn.Module]:
    """The modules of the process that stand in no other."""
    found: list[nn.Module] = alive(lambda kind: issubclass(kind, nn.Module))
    # one that is being made has none yet
    modules = [m for m in found if "_modules" in m.__dict__]
    inside = {id(child) for m in modules for child in m._modules.values()}
    return [m for m in modules if id(m) not in inside]
