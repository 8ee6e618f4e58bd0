"""Gradients that a run has accumulated and not used yet, as one more object with a state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from actckpt.resuming.parameter_names import named_parameters


class Gradients:
    """The gradients of all parameters of a run.

    Loading rebinds them, and drops those that were not saved.

    Args:
        objects: what the run was given, by item.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = dict(objects)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every gradient that there is, by parameter name."""
        return {n: p.grad for n, p in self._parameters() if p.grad is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Exactly these gradients."""
        for name, parameter in self._parameters():
            saved = state.get(name)
            parameter.grad = None if saved is None else saved.to(parameter.device)

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the modules, then those that only an optimizer has."""
        seen: set[int] = set()
        for name, parameter in named_parameters(self._objects):
            seen.add(id(parameter))
            yield name, parameter
        for item, x in self._objects.items():
            if isinstance(x, torch.optim.Optimizer):
                parameters = [p for group in x.param_groups for p in group["params"]]
                for number, parameter in enumerate(parameters):
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield f"{item}:{number}", parameter
