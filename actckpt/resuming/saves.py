"""When the state of a run is saved, what of it is saved already, and what saving failed with."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.snapshot import Snapshot, entries, is_saved_as
from actckpt.errors import CheckpointSaveError, CheckpointUnknownError
from actckpt.resuming.places import Place, Places
from actckpt.resuming.progress import Progress
from actckpt.resuming.run_state import RunState
from actckpt.resuming.saving import Saver, Saving
from actckpt.resuming.under_way import UnderWay

logger = logging.getLogger("actckpt")


class Saves:
    """The saves of one run.

    Args:
        background: whether those that are due are begun, and not made at once.
        skips: whether a state that is saved already is not saved again; ranks would each decide.
        raises: whether what a save that nobody waits for fails with is raised; otherwise it is
            logged, and the run goes on.
    """

    def __init__(
        self,
        saver: Saver,
        state: RunState,
        progress: Progress,
        places: Places,
        background: bool,
        raises: bool = True,
        skips: bool = True,
    ) -> None:
        self._skips = skips
        self._raises = raises
        self.under_way = UnderWay(state.objects)
        self._saver = saver
        self._state = state
        self._progress = progress
        self._places = places
        self._background = background
        # their steps wait, from when there is something to wait for
        self._guarded = False
        # the last save, unless the state is known to be another since
        self._saved: Checkpoint | Saving | None = None
        self._saved_to: tuple[Place, ...] = ()

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
        self._saved, self._saved_to = checkpoint, (self._places.of(checkpoint),)
        for place in self._places.all:
            place.cadence.restart()

    def due(self) -> tuple[Place, ...]:
        """Where the state after this step is to be saved."""
        return self._places.due(self._progress.step)

    def make(self, tag: str, added: Mapping[str, float]) -> Checkpoint:
        """A durable checkpoint of the state as it is; that which there is, if it is saved already.

        Raises:
            CheckpointError: as `actckpt.Checkpointer.save`.
        """
        self._saver.wait()
        self.begin(tag, added, (self._places.main,), wait=True)
        self.raise_failures()
        made = self._saved.checkpoint if isinstance(self._saved, Saving) else self._saved
        assert made is not None, "a save that did not fail has made one"
        return made

    def make_due(self, places: tuple[Place, ...]) -> None:
        """Begins a save that is due in some places, or makes it, as ``background`` says.

        Raises:
            CheckpointError: as `begin`, where that is to be raised.
        """
        try:
            self.begin("", {}, places, wait=not self._background)
            if not self._background:
                self.raise_failures()
        except (CheckpointSaveError, CheckpointUnknownError) as error:
            if self._raises:
                raise
            self._saved = None
            logger.warning("actckpt: a checkpoint that was due was not saved: %s", error)

    def begin(
        self, tag: str, added: Mapping[str, float], places: tuple[Place, ...], *, wait: bool
    ) -> None:
        """Saves the state in some places, unless it is there.

        Args:
            wait: False only begins; a thread writes.

        Raises:
            CheckpointError: it could not begin, or, with ``wait``, end.
        """
        there = set(places) <= set(self._saved_to)
        if self._skips and not added and there and self._is_saved(tag):
            return
        self._progress.report(added)
        self._saved, self._saved_to = None, places
        begin = time.monotonic()
        for reason in self.under_way.reasons():
            logger.warning("actckpt: not to be resumed bit for bit: %s", reason)

        def durable() -> None:
            for place in places:
                place.cadence.ended(time.monotonic() - begin)

        step = self._progress.step
        ticket = self._saver.ticket(step, places)
        try:
            if wait:
                self._saved = self._saver.now(self.snapshot(tag), ticket, places)
                durable()
            else:
                snapshot = self.snapshot(tag)
                steady = self._state.is_steady
                self._saved = self._saver.behind(snapshot, steady, durable, ticket, places)
                self._guard_optimizers()
        except BaseException as error:
            self._saver.ended(ticket, step, tag, None, error)
            raise
        finally:
            # what one that is due costs: another kind says nothing of that
            typical = wait != self._background
            for place in places:
                place.cadence.began(time.monotonic() - begin if typical else None)

    def _is_saved(self, tag: str) -> bool:
        """Whether the state as it is has been saved under this tag, or failed to be.

        A loop of the user's own may have changed it without a word: the bytes say.
        """
        saved = self._saved
        if saved is None or saved.tag != tag:
            return False
        if isinstance(saved, Saving):
            if saved.error is not None:
                return self._raises  # it is still to be raised, or was said
            same = saved.entries() == entries(self.snapshot(tag))
            made = saved.checkpoint
        else:
            same = is_saved_as(self.snapshot(tag), saved.manifest)
            made = saved
        if not same:
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
        if not self._raises:
            # said already, by the thread that it failed in
            told = (CheckpointSaveError, CheckpointUnknownError)
            failures = [error for error in failures if not isinstance(error, told)]
            if isinstance(self._saved, Saving) and self._saved.error is not None:
                self._saved = None
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
