"""Models that a trainer holds beside the one that it trains: what they take, whether they move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from actckpt.tracing.tracer import model_device


def models_beside(trainer: Any, model: nn.Module) -> dict[str, int]:
    """Bytes of the models that a trainer holds beside the one it trains, on its device, by name.

    A reference model and a loss with weights lie there through every step.
    """
    found = {name: _bytes(modules, model) for name, modules in _modules(trainer)}
    return {name: size for name, size in found.items() if size}


# of each tensor, to see whether it changes
_ELEMENTS = 8192


def weights_beside(
    trainer: Any, kept: Iterable[object] = ()
) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """By attribute: some elements, in memory, of all weights that are not the trained model's.

    A teacher that follows the model, or a loss with weights, changes as it trains.

    Args:
        kept: what is saved with the run; weights of modules among them are none of these.
    """
    modules = [trainer.model, *(x for x in kept if isinstance(x, nn.Module))]
    known = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
    found = {
        name: [
            (key, _some(t))
            for module in modules
            for key, t in module.state_dict(keep_vars=True).items()
            if isinstance(t, torch.Tensor) and id(t) not in known
        ]
        for name, modules in _modules(trainer)
    }
    return {name: weights for name, weights in found.items() if weights}


def _some(x: torch.Tensor) -> torch.Tensor:
    """Elements from all over a tensor, or itself where it has no plain ones."""
    try:
        return x.detach().reshape(-1)[:: x.numel() // _ELEMENTS + 1].cpu()
    except (RuntimeError, TypeError):
        return x


def _modules(trainer: Any) -> Iterator[tuple[str, list[nn.Module]]]:
    for name, value in vars(trainer).items():
        items: Iterable[Any] = value.values() if isinstance(value, dict) else [value]
        if isinstance(value, list | tuple):
            items = value
        if found := [x for x in items if isinstance(x, nn.Module)]:
            yield name, found


def _bytes(modules: list[nn.Module], model: nn.Module) -> int:
    """Of parameters, their gradients, and buffers that are not the model's, on its device."""
    own = set(_storages([model]))
    device = torch.device(model_device(model)).type
    found = {key: size for key, size in _storages(modules).items() if key not in own}
    return sum(size for (where, _), size in found.items() if where == device)


def _storages(modules: list[nn.Module]) -> dict[tuple[str, int], int]:
    """(kind of device, address) -> bytes; twice as many of what gets a gradient as large."""
    found: dict[tuple[str, int], int] = {}
    for module in modules:
        for t in (*module.parameters(), *module.buffers()):
            storage = t.untyped_storage()
            key = (t.device.type, storage.data_ptr())
            found[key] = storage.nbytes() * (2 if t.requires_grad else 1)
    return found
