"""A checkpoint that a run may go on from, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from actckpt.checkpoint.discovery import Checkpoint, Skipped


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of them.

    Args:
        name: how messages call it.
        get: the checkpoint, in a folder of this machine; brings it there where it is in a store.
    """

    name: str
    step: int
    serial: int
    get: Callable[[], Checkpoint]


@dataclass(frozen=True, slots=True)
class Candidates:
    """What there is: ``found`` newest first.

    Args:
        skipped: what is named as a checkpoint and cannot be used.
        unreached: stores that cannot be read now, and why.
    """

    found: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    unreached: tuple[str, ...] = ()
