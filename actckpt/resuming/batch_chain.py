"""The batches that an optimizer step was made of, as one digest."""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from actckpt.resuming.batch_digest import batch_digest


@dataclass(slots=True)
class BatchChain:
    """The batches since the last optimizer step.

    Args:
        text: the digest of their digests, "" for none.
        count: how many.
        known: whether all of them are in it.
    """

    text: str = ""
    count: int = 0
    known: bool = True

    def add(self, batch: object) -> None:
        """One more was read."""
        self.count += 1
        try:
            digest = batch_digest(batch)
        except Exception:  # a batch may be anything, and its own code fail in any way
            self.known = False
            return
        self.text = xxhash.xxh3_64_hexdigest((self.text + digest.text).encode())

    def pass_over(self) -> None:
        """One more was read, and not looked at."""
        self.count += 1
        self.known = False

    @property
    def seen(self) -> tuple[str, int] | None:
        """The digest and how many; None where there were none, or one is not in it."""
        return (self.text, self.count) if self.known and self.count else None
