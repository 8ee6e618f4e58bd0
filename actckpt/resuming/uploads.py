"""Finished checkpoints on their way to an object store, in a thread, one at a time."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from actckpt.checkpoint.discovery import Checkpoint, Skipped
from actckpt.checkpoint.object_store import ObjectStore, Stored
from actckpt.errors import CheckpointError, CheckpointSaveError
from actckpt.resuming.cadence import Cadence

logger = logging.getLogger("actckpt")


class Uploads:
    """What of a run goes to one store.

    Args:
        keep: how many of the newest checkpoints stay there.
        in_use: told of a checkpoint's name that it is read, and that it no longer is.
    """

    def __init__(
        self,
        store: ObjectStore,
        cadence: Cadence,
        keep: int,
        in_use: Callable[[str, bool], None],
    ) -> None:
        self.store = store
        self._cadence = cadence
        self._keep = keep
        self._in_use = in_use
        # what was there when it was looked into last; None before, or where that failed
        self._seen: list[Stored] | None = None
        # names there of this run, oldest first; only they are ever deleted
        self._own: list[str] = []
        self._is_ready = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._guard = threading.Lock()
        # that went last, or is to go
        self._last: Checkpoint | None = None
        self._thread: threading.Thread | None = None
        self._next: Checkpoint | None = None
        self.error: CheckpointError | None = None

    def look(self) -> tuple[list[Stored], list[Skipped]]:
        """As `ObjectStore.stored`; whose they are is not said by that."""
        self._seen = None
        stored, skipped = self.store.stored()
        self._seen = stored
        return stored, skipped

    @property
    def seen(self) -> list[Stored]:
        """What was there when it was looked into last."""
        return self._seen or []

    def go_on(self) -> None:
        """What was there when it was looked into last is the run's own."""
        self._own = [s.name for s in reversed(self.seen)]

    def offer(self, checkpoint: Checkpoint, *, last: bool = False) -> None:
        """A durable checkpoint, which goes to the store if that is due, or if it is the ``last``.

        One that waits for its turn gives way to it.
        """
        if self._process != os.getpid():
            self._begin()  # in a forked child: the thread is the parent's
        with self._guard:
            before = None if self._last is None else self._last.step
            due = last or self._cadence.passed(checkpoint.step, before)
            if not due or checkpoint == self._last:
                return
            self._last = checkpoint
            self._cadence.restart()
            if self._next is not None:
                self._in_use(self._next.path.name, False)
            self._next = checkpoint
            self._in_use(checkpoint.path.name, True)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="actckpt-upload")
                try:
                    self._thread.start()
                except RuntimeError as error:  # there can be no further thread
                    self._thread = self._next = None
                    self._in_use(checkpoint.path.name, False)
                    self._failed(CheckpointSaveError(f"{checkpoint.path} stays here: {error}"))

    def wait(self) -> None:
        """Returns when nothing is under way."""
        thread = self._thread
        if thread is not None and self._process == os.getpid():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._guard:
                checkpoint, self._next = self._next, None
                if checkpoint is None:
                    self._thread = None
                    return
            try:
                self._upload(checkpoint)
                self.error = None
            except CheckpointError as error:
                self._failed(error)
            finally:
                self._in_use(checkpoint.path.name, False)

    def _failed(self, error: CheckpointError) -> None:
        self.error = error
        # the next checkpoint is tried, whenever it is
        self._last = None
        logger.warning("actckpt: %s", error)

    def _upload(self, checkpoint: Checkpoint) -> None:
        if not self._is_ready:
            self._check(checkpoint)
            self.store.clean()
            self._is_ready = True
        stored = self.store.upload(checkpoint)
        self._own = [name for name in self._own if name != stored.name] + [stored.name]
        for name in self._own[: -self._keep]:
            try:
                self.store.retire(name)
            except CheckpointError as error:  # the new one is there all the same
                logger.warning("actckpt: an old checkpoint could not be deleted: %s", error)
                return
            self._own.remove(name)

    def _check(self, checkpoint: Checkpoint) -> None:
        """That nothing is there which would be taken for newer, where nobody could look before."""
        if self._seen is not None:
            return
        stored, _ = self.store.stored()
        newer = [s for s in stored if s.manifest.serial >= checkpoint.manifest.serial]
        if newer:
            raise CheckpointSaveError(
                f"{self.store.url} could not be read when this run began, and holds step "
                f"{newer[0].manifest.step}, saved later than what it went on from: nothing is "
                "copied there. Start it again and resume(), or choose another address"
            )
