"""Every error that actckpt raises on purpose: what was asked, what was found, what would work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actckpt.plan import Plan


class ActckptError(Exception):
    """Root of all errors raised by actckpt."""


class TraceError(ActckptError):
    """The training step could not be traced on fake tensors; the message names the line."""


class PlanError(ActckptError):
    """A plan is malformed, does not belong to this model, or no plan is in force."""


class ReplayError(ActckptError, RuntimeError):
    """A recomputation did not reproduce what the forward pass had saved."""


class BudgetError(ActckptError, ValueError):
    """No plan fits the budget, or the budget is not a positive number.

    Attributes:
        budget_bytes: what was asked, or None when it was not a number.
        smallest_bytes: the smallest peak found, or None when nothing was planned.
        smallest_plan: the plan of that peak, where a policy raises the error and has one.
        excluded_bytes: it is proved that no plan has a lower peak; None when nothing was planned.
        split: what ``smallest_bytes`` is made of, in bytes by name; empty when nothing was planned.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int | None = None,
        smallest_bytes: int | None = None,
        smallest_plan: Plan | None = None,
        excluded_bytes: int | None = None,
        split: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.smallest_plan = smallest_plan
        self.excluded_bytes = excluded_bytes
        self.split = dict(split or {})


class TargetError(ActckptError, ValueError):
    """A command line TARGET names no model, or its settings do not fit the model."""


class ReportError(ActckptError, ValueError):
    """A report or measurement cannot be read or written as asked."""


class CheckpointError(ActckptError):
    """A checkpoint, or a directory of them, cannot be used as asked."""


class CheckpointFormatError(CheckpointError, ValueError):
    """A checkpoint's files are damaged, incomplete, or written by another version."""


class CheckpointSaveError(CheckpointError):
    """A checkpoint could not be written, or the state holds what no checkpoint can; none was made.

    Earlier checkpoints are as before. Where it was the very last call that failed, which makes the
    new name durable, a sound checkpoint is there that a loss of power may take away.

    Attributes:
        needed_bytes, free_bytes: where there was too little space, what a checkpoint needs, and
            what there was; else None.
    """

    def __init__(
        self, message: str, *, needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class CheckpointMismatchError(CheckpointError, ValueError):
    """A sound checkpoint does not belong to these objects; they are as before."""


class CheckpointDifferenceError(CheckpointError):
    """A step that a resumed run made again came out otherwise than it had.

    Attributes:
        step: its number.
        differs: what of it: "batch", "random state torch", "metric loss", "weights of fc1.bias".
    """

    def __init__(self, message: str, *, step: int, differs: tuple[str, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.differs = differs
