"""What a process says before it ends: all that it was promised, and all that it was told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str, Any], None]

# after these words more is promised than before
PROMISES = ("claimed", "pinned", "unpinned")
PINNING = ("pinning", "pinned", "unpinning", "unpinned")


@dataclass(slots=True)
class Acted:
    """What a process said, each list in order.

    Args:
        resumed: step it went on from, 0 for a new run; None if it did not get so far.
        begun: steps that it began to save.
        claimed: steps that it said it has saved.
        failed: steps that it was told were not saved.
        errors: what it was told that with.
        refused: what anything else failed with.
        pins: by step, the last that it said of pinning it; "pinned" and "unpinned" are promises.
    """

    resumed: int | None = None
    begun: list[int] = field(default_factory=list)
    claimed: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    refused: list[Exception] = field(default_factory=list)
    pins: dict[int, str] = field(default_factory=dict)

    def say(self, word: str, what: Any) -> None:
        """Takes down one of these; of a pin the word is its state."""
        if word == "resumed":
            self.resumed = what
        elif word in PINNING:
            self.pins[what] = word
        else:
            getattr(self, word).append(what)

    @property
    def expects(self) -> tuple[tuple[Any, ...], ...]:
        """All that a directory is judged by."""
        return (*map(tuple, (self.begun, self.claimed, self.failed)), tuple(self.pins.items()))
