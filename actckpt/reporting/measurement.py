"""What real training steps needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from actckpt.errors import ReportError
from actckpt.reporting.strict_json import document, fields_of
from actckpt.reporting.table import align
from actckpt.units import format_bytes, format_seconds

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """Peak memory and time of real training steps.

    Args:
        peak_bytes: highest level of allocated device memory.
        added_bytes: the peak above what existed before the step, gradients excluded: what
            ``scope="activations"`` bounds.
        reserved_bytes: what the allocator held of the device, or None where there is none.
        step_s: median time of a step.
        step_s_spread: the fastest and the slowest step.
        loss: of the first step, or None where backward started from outputs.
        steps: how many were timed.
        split: category -> bytes at the peak.
    """

    peak_bytes: int
    added_bytes: int
    reserved_bytes: int | None
    step_s: float
    step_s_spread: tuple[float, float]
    loss: float | None
    steps: int
    split: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        fastest, slowest = self.step_s_spread
        rows = [
            ["peak", format_bytes(self.peak_bytes)],
            ["added by the step", format_bytes(self.added_bytes)],
        ]
        if self.reserved_bytes is not None:
            rows.append(["reserved", format_bytes(self.reserved_bytes)])
        rows.append(["step time", format_seconds(self.step_s)])
        if self.loss is not None:
            rows.append(["loss", f"{self.loss:.6g}"])
        rows += [[f"  {name} at the peak", format_bytes(b)] for name, b in self.split.items() if b]
        return "\n".join(
            [
                f"{self.steps} measured {'step' if self.steps == 1 else 'steps'}, "
                f"{format_seconds(fastest)} to {format_seconds(slowest)}",
                *align(rows),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `Measurement.from_json` reads it back equal.

        A loss that is not finite becomes text, since strict JSON has no number for it.
        """
        data = asdict(self)
        if self.loss is not None and not math.isfinite(self.loss):
            data["loss"] = str(self.loss)
        return document("measurement", FORMAT_VERSION, data)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Measurement:
        """The measurement that `to_json` wrote.

        Raises:
            ReportError: the data is no measurement, or of a version that is not known here.
        """
        fields = fields_of("measurement", FORMAT_VERSION, data)
        try:
            fastest, slowest = fields["step_s_spread"]
            loss = fields["loss"]
            return cls(
                **{
                    **fields,
                    "step_s_spread": (fastest, slowest),
                    "loss": None if loss is None else float(loss),
                    "split": dict(fields["split"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"not a measurement: {error}") from error
