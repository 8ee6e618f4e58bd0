"""Whether the steps that a run counts are made on the batches that its loader hands out."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from actckpt.resuming.loaders import length_of
from actckpt.resuming.passes import Pass
from actckpt.resuming.reading import Reading

_NO_LOADER = (
    "the Checkpointer was given no loader, and the loop is not run.steps(): where it is in its "
    "data is not known. Pass loader=, and iterate it or run.steps(); a loop without data can be "
    "run.steps(range(n))"
)

_AHEAD = (
    "batches are read ahead of the steps that are made on them: those that were read and not "
    "trained on are lost. Iterate run.steps(loader)"
)


class StepsSeen:
    """Batches between steps, and what of that is no position in the data."""

    def __init__(self) -> None:
        self.latest: Pass | None = None
        self._readers: list[weakref.ref[Reading]] = []
        self._reader: weakref.ref[Reading] | None = None
        self._batches = 0
        self._thread = 0
        self.steps = 0
        self._unseen = 0
        self._why = ""
        # of a loop of the user's own: batches of the first step in this pass, and whether a later
        # one had fewer
        self._first: tuple[Pass, int] | None = None
        self._fewer = self._left = False
        # of `steps`: steps on the batch in hand, and on an earlier one
        self._on_batch = 0
        self._most = 0

    def handed_out(self, reading: Reading) -> None:
        """A batch was."""
        self._batches += 1
        self._thread = threading.get_ident()
        self.latest = reading.made
        if self._reader is None or self._reader() is not reading:
            self._reader = weakref.ref(reading)
            self._readers.append(self._reader)
        if reading.driver:
            self._why = (
                f"the loop is {reading.driver}, which keeps epochs and batches of its own: where "
                "it goes on is not known. Iterate run.steps(loader) in a loop of your own"
            )

    def holds_batch(self) -> bool:
        """Whether somebody still reads, and was given a batch since the last step."""
        return self._batches > 0 and self._is_read()

    def _is_read(self) -> bool:
        assert self.latest is not None
        return self.latest.ended or (self._reader is not None and self._reader() is not None)

    def stepped(self, *, by_steps: bool) -> Pass | None:
        """A step was made; returns the pass on whose batch, None where on no known one."""
        batches, self._batches = self._batches, 0
        readers, self._readers = self._readers, []
        self._readers += [self._reader] if self._reader is not None else []
        self.steps += 1
        made = self.latest
        if by_steps:
            self._on_batch = 1 if batches else self._on_batch + 1
            if batches == 0 and (made is None or made.ended):
                self._unseen += 1
            return made
        if made is None or not batches or not self._is_read():
            self._unseen += 1
            return None
        if self._thread != threading.get_ident():
            self._why = _AHEAD
        others = [r for ref in readers if (r := ref()) is not None and r.made is not made]
        if any(not r.made.ended for r in others if r.made.batch):
            self._why = (
                "two passes over the loader are made at once: only the place of one is kept. "
                "Iterate it once, or run.steps(loader)"
            )
        if self._first is None or self._first[0] is not made:
            self._first, self._fewer = (made, batches), False
        elif batches < self._first[1]:
            self._fewer = True
        return made

    def left_early(self) -> None:
        """A pass in which steps were made had not ended when the next one began."""
        self._left = True

    def next_batch(self) -> None:
        """`steps` was asked for another batch."""
        self._most = max(self._most, self._on_batch)

    def unkept(self, loader: Any, *, by_steps: bool, driven: bool, trained: bool) -> str:
        """Why the position that was counted is not the run's; or "".

        Args:
            driven: whoever makes the passes says where they end.
            trained: optimizers have made steps, counted or not.
        """
        if self._why:
            return self._why
        if loader is None:
            return _NO_LOADER if self.steps or trained else ""
        if self._unseen:
            return (
                f"{self._unseen} of {self.steps} steps were made on no batch that was seen: the "
                f"{type(loader).__name__} that the Checkpointer was given was not iterated for "
                "them, or cannot be watched. Iterate run.steps(loader)"
            )
        made = self.latest
        if trained and made is None and not self.steps:
            return (
                "the optimizer has made steps, and none was counted by run.step(), nor a batch "
                "seen: where the run is in its data is not known. Iterate run.steps(loader)"
            )
        if by_steps:
            if not self._batches and 0 < self._on_batch < self._most:
                return (
                    f"saved after {self._on_batch} of {self._most} steps on one batch: the rest of "
                    "them is lost. Save after the last"
                )
        elif self._fewer and not driven and made is not None and made.batch != length_of(loader):
            return _AHEAD
        if self._left and made is not None and not (by_steps or driven or made.ended):
            return (
                "the loop left a pass over the loader before its end: where it leaves this one is "
                "not known. Iterate run.steps(loader), or the loader to its end"
            )
        return ""
