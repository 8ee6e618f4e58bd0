"""What became of the save that ended last."""

from __future__ import annotations

from dataclasses import dataclass

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.errors import CheckpointUnknownError


@dataclass(frozen=True, slots=True)
class SaveOutcome:
    """What became of one save; of a run of many ranks, as far as this rank was told.

    Args:
        step: optimizer steps that had been made.
        tag: as it was given to `Checkpointer.save`.
        verdict: "committed", there is a checkpoint; "failed", there is none, and earlier ones are
            as before; "unknown", nobody said: the directory will tell.
        reason: why it is not committed.
        checkpoint: that which was made.
    """

    step: int
    tag: str
    verdict: str
    reason: str = ""
    checkpoint: Checkpoint | None = None

    @property
    def committed(self) -> bool:
        """Whether there is a checkpoint."""
        return self.verdict == "committed"


def outcome_of(
    step: int, tag: str, made: Checkpoint | None, error: BaseException | None
) -> SaveOutcome:
    """Of a save that made a checkpoint, or ended with an error."""
    if made is not None:
        return SaveOutcome(step, tag, "committed", checkpoint=made)
    unknown = isinstance(error, CheckpointUnknownError)
    if error is None:
        return SaveOutcome(step, tag, "failed", "it was due beside the directory; the log says why")
    reason = str(error) or type(error).__name__
    return SaveOutcome(step, tag, "unknown" if unknown else "failed", reason)
