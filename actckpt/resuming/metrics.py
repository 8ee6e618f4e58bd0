"""Metrics that a run reports: as plain numbers, and how long ago each was at its best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from actckpt.errors import ArgumentError


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics as plain floats.

    Raises:
        ArgumentError: they are no mapping, or one is neither a number nor a tensor of one.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ArgumentError(
            'metrics must be a dict of them by name, such as step({"loss": loss}); found '
            f"{_described(metrics)}. Where there are none to report, step() takes nothing"
        )
    found = {}
    for name, value in (metrics or {}).items():
        try:
            # the loss itself may be given: it is read, not differentiated
            plain = value.detach() if isinstance(value, torch.Tensor) else value
            found[str(name)] = float(plain)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"metric {name} must be a number, or a tensor of one; found {value!r:.80}"
            ) from error
    return found


def _described(given: object) -> str:
    if isinstance(given, torch.Tensor):
        return f"a tensor of shape {list(given.shape)}"
    return f"{type(given).__name__} {given!r:.60}"


@dataclass(slots=True)
class Extremes:
    """The least and the greatest value of a metric, and how many reports came after each."""

    least: float = math.inf
    since_least: int = 0
    greatest: float = -math.inf
    since_greatest: int = 0

    def report(self, value: float) -> None:
        """One more value; a NaN is neither the least nor the greatest."""
        self.since_least += 1
        self.since_greatest += 1
        if value < self.least:
            self.least, self.since_least = value, 0
        if value > self.greatest:
            self.greatest, self.since_greatest = value, 0


class MetricHistory:
    """The extremes of every metric of a run."""

    def __init__(self) -> None:
        self._extremes: dict[str, Extremes] = {}

    def report(self, metrics: Mapping[str, float]) -> None:
        """Values that were reported together."""
        for name, value in metrics.items():
            self._extremes.setdefault(name, Extremes()).report(value)

    def since_best(self, metric: str, mode: str) -> int:
        """How many reports of a metric came after its best; 0 if there was none yet."""
        extremes = self._extremes.get(metric, Extremes())
        return extremes.since_least if mode == "min" else extremes.since_greatest

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {name: asdict(extremes) for name, extremes in self._extremes.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._extremes = {name: Extremes(**values) for name, values in state.items()}
