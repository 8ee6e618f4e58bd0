"""Buffers that modules do not count to their state, as one more object with a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Buffers:
    """The non-persistent buffers of a model: a forward pass may depend on them all the same."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every one that there is, by name."""
        return {
            f"{path}.{name}" if path else name: buffer
            for path, module in self._model.named_modules()
            for name in sorted(module._non_persistent_buffers_set)
            if (buffer := module._buffers.get(name)) is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes these what they were; one of another shape, as caches are, is replaced."""
        modules = dict(self._model.named_modules())
        for key, saved in state.items():
            path, _, name = key.rpartition(".")
            module = modules.get(path)
            if module is None or name in module._parameters:
                continue
            live = module._buffers.get(name)
            if live is not None and (live.shape, live.dtype) == (saved.shape, saved.dtype):
                with torch.no_grad():
                    live.copy_(saved)
            elif name in module._buffers or not hasattr(module, name):
                module.register_buffer(name, saved.to(_device(self._model)), persistent=False)


class OtherBuffers:
    """Those of the modules beside the model: an average of it, a second model.

    Args:
        modules: by item.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._buffers = {item: Buffers(module) for item, module in modules.items()}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of each module that has any, by name."""
        states = {item: buffers.state_dict() for item, buffers in self._buffers.items()}
        return {item: state for item, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes them what they were."""
        for item, buffers in self._buffers.items():
            buffers.load_state_dict(state.get(item, {}))


def _device(model: nn.Module) -> torch.device:
    """Where the model is."""
    found = next(model.parameters(), None)
    return torch.device("cpu") if found is None else found.device
