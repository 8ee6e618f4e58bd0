"""Every error that actckpt raises on purpose: what was asked, what was found, what would work.

`actckpt.data.budget_error` has the one that hands over a plan.
"""

from __future__ import annotations


class ActckptError(Exception):
    """Root of all errors raised by actckpt."""


class ArgumentError(ActckptError, TypeError, ValueError):
    """An argument is not what a public function takes; found before anything was touched."""


class TraceError(ActckptError):
    """The training step could not be traced on fake tensors; the message names the line."""


class PlanError(ActckptError):
    """A plan is malformed, does not belong to this model, or no plan is in force."""


class ExportError(PlanError, AttributeError):
    """An optimized model was to be exported, scripted or traced: `actckpt.revert` comes first."""


class ReplayError(ActckptError, RuntimeError):
    """A recomputation did not reproduce what the forward pass had saved."""


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


class CheckpointUnknownError(CheckpointError):
    """Nobody said whether the ranks of a run have saved a checkpoint: the directory will tell."""


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


class WeightsExportError(ActckptError, ValueError):
    """Weights cannot be written in a format as asked, or did not read back; nothing was written."""
