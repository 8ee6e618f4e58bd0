"""When the state of a run is saved, what of it is saved already, and what saving failed with."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.snapshot import Snapshot, entries
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.metrics import numbers
from actckpt.resuming.progress import Progress
from actckpt.resuming.run_state import RunState
from actckpt.resuming.saving import Saver, Saving
from actckpt.resuming.under_way import UnderWay

logger = logging.getLogger("actckpt")


class Saves:
    """The saves of one run.

    Args:
        background: whether those that are due are begun, and not made at once.
    """

    def __init__(
        self,
        saver: Saver,
        state: RunState,
        progress: Progress,
        cadence: Cadence,
        background: bool,
    ) -> None:
        self.under_way = UnderWay(state.objects)
        self._saver = saver
        self._state = state
        self._progress = progress
        self._cadence = cadence
        self._background = background
        # their steps wait, from when there is something to wait for
        self._guarded = False
        # the last save, unless the state is known to be another since
        self._saved: Checkpoint | Saving | None = None

    def changed(self) -> None:
        """The state is no longer one that is saved."""
        self._saved = None

    def handed_out(self) -> None:
        """A batch was."""
        self.changed()
        self.under_way.handed_out(first=self._progress.position.batch <= 1)

    def asked_on(self) -> None:
        """The loop has done with the last batch what it does."""
        self.under_way.asked_on()

    def counted(self) -> None:
        """A step was."""
        self.changed()
        self.under_way.counted()

    def put_back(self, checkpoint: Checkpoint) -> None:
        """The state is that of a checkpoint, and the next is due an interval from now."""
        self._saved = checkpoint
        self._cadence.restart()

    def due(self) -> bool:
        """Whether the state after this step is to be saved."""
        return self._cadence.due(self._progress.step)

    def make(self, tag: str, metrics: Mapping[str, Any] | None) -> Checkpoint:
        """A durable checkpoint of the state as it is; that which there is, if it is saved already.

        Raises:
            CheckpointError: as `actckpt.Checkpointer.save`.
        """
        self._begin(tag, metrics, wait=True)
        self._saver.wait()
        self.raise_failures()
        made = self._saved.checkpoint if isinstance(self._saved, Saving) else self._saved
        assert made is not None, "a save that did not fail has made one"
        return made

    def begin(self, tag: str, metrics: Mapping[str, Any] | None) -> None:
        """Begins what `make` makes; a thread writes.

        Raises:
            CheckpointError: it could not begin.
        """
        self._begin(tag, metrics, wait=False)

    def _begin(self, tag: str, metrics: Mapping[str, Any] | None, wait: bool) -> None:
        added = numbers(metrics)
        if not added and self._is_saved(tag):
            return
        self._progress.report(added)
        self._saved = None
        begin = time.monotonic()
        for reason in self.under_way.reasons():
            logger.warning("actckpt: not to be resumed bit for bit: %s", reason)

        def durable() -> None:
            self._cadence.ended(time.monotonic() - begin)

        try:
            if wait:
                self._saved = self._saver.now(self.snapshot(tag))
                durable()
            else:
                snapshot = self.snapshot(tag)
                self._saved = self._saver.behind(snapshot, self._state.is_steady, durable)
                self._guard_optimizers()
        finally:
            # what one that is due costs: another kind says nothing of that
            typical = wait != self._background
            self._cadence.began(time.monotonic() - begin if typical else None)

    def _is_saved(self, tag: str) -> bool:
        """Whether the state as it is has been saved under this tag, or failed to be.

        A loop of the user's own may have changed it without a word: the bytes say.
        """
        saved = self._saved
        if saved is None or saved.tag != tag:
            return False
        if isinstance(saved, Saving):
            if saved.error is not None:
                return True  # it is still to be raised
            known: Mapping[str, FileEntry] = saved.entries()
            made = saved.checkpoint
        else:
            known = saved.manifest.files
            made = saved
        if known != entries(self.snapshot(tag)):
            return False
        return made is None or self._saver.is_sound(made)

    def snapshot(self, tag: str = "") -> Snapshot:
        """The state as it is, of the live tensors."""
        progress = self._progress
        return Snapshot(
            step=progress.step,
            items=self._state.gather(
                {**progress.items(), "under-way": self.under_way.item()},
                accumulating=progress.accumulating,
            ),
            tag=tag,
            metrics=dict(progress.metrics),
            fingerprint=self._state.fingerprint(),
            versions=self._state.versions(),
        )

    def _guard_optimizers(self) -> None:
        """Lets the optimizers call `Saver.guard` themselves, from when that does something."""
        if self._saver.copies_beside and not self._guarded:
            self._guarded = True
            for optimizer in self._state.optimizers:
                optimizer.register_step_pre_hook(partial(_guard, weakref.ref(self._saver)))

    def raise_failures(self) -> None:
        """Raises what saves in the background failed with, once; the others as its notes."""
        failures = self._saver.failures()
        if not failures:
            return
        error, *others = failures
        if isinstance(self._saved, Saving) and self._saved.error is not None:
            self._saved = None  # asked again, this state is saved anew
        elif isinstance(self._saved, Checkpoint):
            error.add_note(f"This was an earlier save; {self._saved.path} is saved.")
        for other in others:
            error.add_note(f"Nor was another: {other}")
        raise error


def _guard(saver: weakref.ref[Saver], *_: Any) -> None:
    found = saver()
    if found is not None:
        found.guard()
