"""What each distinct operation costs on a device, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from actckpt.data.brief import brief
from actckpt.errors import PlanError


@dataclass(frozen=True, slots=True)
class Cost:
    """One execution of one operation.

    ``workspace_bytes`` is the scratch above inputs and outputs while the kernel runs. ``source``
    is "measured" or "roofline".
    """

    time_s: float
    workspace_bytes: int = 0
    source: str = "measured"

    def __post_init__(self) -> None:
        if not self.time_s >= 0 or self.workspace_bytes < 0:
            raise PlanError(f"a cost must not be negative: {self}")


@dataclass(frozen=True, slots=True)
class Profile:
    """``costs[i]`` is the cost of the operations whose ``signature`` is ``i``.

    ``dispatch_s`` is what a dispatch mode adds to one operation, ``region_s`` what one region adds
    to a step, ``save_s`` what one recomputed save adds, ``follow_s`` what following adds to one
    function call, ``pass_s`` to one that it sees and does not compare, and ``stretch_s`` what
    taking it up and leaving it off adds; ``burst_s`` what one burst, ``burst_op_s`` what one of its
    operations and ``burst_save_s`` what one of the saves that it makes again adds: the overheads of
    the engine, as steps show them in which tensors have emptied the caches
    (``python -m experiments.prediction``); a warm loop shows half.
    """

    device: str
    costs: tuple[Cost, ...]
    dispatch_s: float = 20e-6
    region_s: float = 300e-6
    save_s: float = 35e-6
    follow_s: float = 30e-6
    pass_s: float = 10e-6
    stretch_s: float = 80e-6
    burst_s: float = 40e-6
    burst_op_s: float = 8e-6
    burst_save_s: float = 30e-6

    __repr__ = brief

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `Profile.from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """The profile that `to_json` wrote."""
        return cls(**{**data, "costs": tuple(Cost(**c) for c in data["costs"])})
