"""What resuming found and did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actckpt.checkpoint.discovery import Checkpoint, Skipped

# what bits depend on beside the state
DECISIVE = ("torch", "processor", "device", "cuda", "cudnn", "threads", "platform")


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run as it was put back.

    Args:
        checkpoint: the one that was chosen.
        epoch: where the data goes on, with ``batch``.
        batch: how many batches of this epoch were trained on.
        skipped: newer ones that could not be used, and why.
        inexact: why the run may go on with other bits than the one that was saved.
        plan: what became of the memory plan, "" where there is none.
        notes: what else is different.
    """

    checkpoint: Checkpoint
    epoch: int
    batch: int
    skipped: tuple[Skipped, ...] = ()
    inexact: tuple[str, ...] = ()
    plan: str = ""
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that had been made."""
        return self.checkpoint.step

    @property
    def bit_exact(self) -> bool:
        """Whether the run goes on bit for bit as the one that was saved would have."""
        return not self.inexact

    def __str__(self) -> str:
        lines = [
            f"resumed {self.checkpoint.path} at step {self.step}, epoch {self.epoch}, "
            f"batch {self.batch}"
        ]
        lines += [f"skipped {s.name}: {s.reason}" for s in self.skipped]
        lines += [f"not bit-exact: {reason}" for reason in self.inexact] or ["bit-exact"]
        lines += [f"plan: {self.plan}"] if self.plan else []
        return "\n".join([*lines, *self.notes])


def version_differences(
    saved: Mapping[str, str], here: Mapping[str, str], names: Iterable[str] = DECISIVE
) -> list[str]:
    """What of the machine and the libraries is different, as far as bits may depend on it."""
    return [
        f"{name} was {saved.get(name)}, is {here.get(name)}"
        for name in names
        if saved.get(name) != here.get(name)
    ]
