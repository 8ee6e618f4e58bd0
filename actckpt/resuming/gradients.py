"""Gradients that a run has accumulated and not used yet, as one more object with a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Gradients:
    """The gradients of a model. Loading rebinds them, and drops those that were not saved."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every gradient that there is, by parameter name."""
        return {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Exactly these gradients."""
        for name, parameter in self._model.named_parameters():
            saved = state.get(name)
            parameter.grad = None if saved is None else saved.to(parameter.device)
