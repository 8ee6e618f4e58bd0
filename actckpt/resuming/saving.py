"""Saves beside the training: one thread each, one after another, and what they failed with.

The threads are no daemons: an interpreter that exits waits for a save, as `close` does. A process
that is killed leaves a directory that nobody looks into, which the next writer removes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.snapshot import Snapshot, entries
from actckpt.errors import CheckpointError, CheckpointSaveError, CheckpointUnknownError
from actckpt.resuming.last_save import SaveOutcome, outcome_of
from actckpt.resuming.places import Place, Places
from actckpt.resuming.staging import Staging, StagingSet, Steady

logger = logging.getLogger("actckpt")


class Saving:
    """A save under way; it begins when those before it have ended.

    Args:
        work: makes the checkpoint.
        staged: what of, in memory that stays as it is until the next save begins.
        before: the save that was begun last.
        after: called once it has ended.
    """

    def __init__(
        self,
        work: Callable[[], Checkpoint | None],
        staged: Callable[[], Snapshot],
        before: Saving | None,
        after: Callable[[], None],
        tag: str,
    ) -> None:
        self.tag = tag
        self.checkpoint: Checkpoint | None = None
        self.error: BaseException | None = None
        self._work = work
        self._staged = staged
        self._before = before
        self._after = after
        self._thread = threading.Thread(target=self._run, name="actckpt-save")
        # a join that Ctrl-C interrupts takes the thread for stopped, in Python 3.11 and 3.12
        self._ended = threading.Event()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        # one that did not start, or that Ctrl-C kept from it, has no thread
        return self._thread.ident is not None and not self._ended.is_set()

    def start(self) -> None:
        """Begins.

        Raises:
            CheckpointSaveError: there can be no further thread.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            raise CheckpointSaveError(
                f"saving in the background needs a thread, which cannot be had: {error}. Save with "
                "background=False, which needs none"
            ) from error

    def entries(self) -> dict[str, FileEntry]:
        """Of the checkpoint's files. No other save may have begun since."""
        return entries(self._staged())

    def wait(self) -> None:
        """Returns when it has ended, however it did."""
        if self.running:
            self._ended.wait()

    def _run(self) -> None:
        before, self._before = self._before, None
        # it holds the run, which holds this: dropped, the run is to let go of its directory
        work, after = self._work, self._after
        del self._work, self._after
        if before is not None:
            before.wait()
        try:
            self.checkpoint = work()
        except BaseException as error:
            # raised to whoever asks; said at once, for nobody may
            self.error = error
            what = "may not have been" if isinstance(error, CheckpointUnknownError) else "was not"
            logger.error("actckpt: a checkpoint %s saved: %s", what, error)
        finally:
            del work
            self._ended.set()
            after()


class Saver:
    """Writes snapshots, at once or in the background.

    Args:
        sets, limit_bytes: as for `Staging`; so many saves may be under way.
    """

    def __init__(self, places: Places, sets: int, limit_bytes: int | None) -> None:
        self._places = places
        self._shape = sets, limit_bytes
        self._turn = threading.Lock()
        # of the last save that has ended, whether or not it is known elsewhere
        self.last: SaveOutcome | None = None
        self._last_ticket = 0
        # made and not yet told of, by whichever thread
        self._made: deque[Checkpoint] = deque()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._staging = Staging(*self._shape)
        self._under_way: list[tuple[Saving, StagingSet]] = []
        self._failures: list[BaseException] = []
        self._at_rest: Callable[[], None] | None = None

    def at_rest(self, then: Callable[[], None]) -> None:
        """Calls this once nothing is being written; at once, or in the thread that ends last.

        Not at all where another save comes before.
        """
        self._forget_parent()
        with self._turn:
            if any(saving.running for saving, _ in self._under_way):
                self._at_rest = then
                return
        then()

    def _one_ended(self) -> None:
        with self._turn:
            if self._at_rest is None or any(saving.running for saving, _ in [*self._under_way]):
                return
            then, self._at_rest = self._at_rest, None
        then()

    def _goes_on(self) -> None:
        """The run has not come to its end after all."""
        with self._turn:
            self._at_rest = None

    @property
    def staging_bytes(self) -> int:
        """Memory that staging holds."""
        return self._staging.size_bytes

    def ticket(self, step: int, places: Sequence[Place]) -> int:
        """As `Places.ticket`."""
        return self._places.ticket(step, places)

    def ended(
        self, ticket: int, step: int, tag: str, made: Checkpoint | None, error: BaseException | None
    ) -> None:
        """A save has, however it did; others are told if they wait for this rank's part of it."""
        with self._turn:
            # one that could not begin may be over before an earlier one
            if ticket >= self._last_ticket:
                self._last_ticket, self.last = ticket, outcome_of(step, tag, made, error)
        if error is not None:
            try:
                self._places.decline(ticket, error)
            except CheckpointError as unheard:
                error.add_note(f"The other ranks could not be told: {unheard}")

    def now(self, snapshot: Snapshot, ticket: int, places: Sequence[Place]) -> Checkpoint | None:
        """A durable checkpoint, of the live tensors themselves; as `Places.write`.

        Raises:
            CheckpointError: as `Places.write`.
        """
        self._goes_on()
        self.wait()
        made = self._places.write(snapshot, ticket, places)
        return self._told(snapshot, ticket, made)

    def _told(self, snapshot: Snapshot, ticket: int, made: Checkpoint | None) -> Checkpoint | None:
        self.ended(ticket, snapshot.step, snapshot.tag, made, None)
        if made is not None:
            self._made.append(made)
        return made

    def made(self) -> Iterator[Checkpoint]:
        """The checkpoints that were made since this was asked last, oldest first."""
        while self._made:
            yield self._made.popleft()

    def is_sound(self, checkpoint: Checkpoint) -> bool:
        """As `RunDirectory.is_sound`."""
        return self._places.of(checkpoint).directory.is_sound(checkpoint)

    def behind(
        self,
        snapshot: Snapshot,
        steady: Steady,
        durable: Callable[[], None],
        ticket: int,
        places: Sequence[Place],
    ) -> Saving:
        """A save that goes on while training does; waits where every staging set is in use.

        Args:
            durable: called, in another thread, once there is a checkpoint.

        Raises:
            CheckpointError: it could not begin.
        """
        self._forget_parent()
        self._goes_on()
        self._places.acquire()
        into = self._free_set()
        staged = replace(snapshot, items=self._staging.copy(snapshot.items, into, steady))

        def ready() -> Snapshot:
            try:
                into.await_copies()
            except RuntimeError as error:
                raise CheckpointSaveError(
                    f"step {staged.step} could not be copied to be saved: {error}"
                ) from error
            return staged

        def work() -> Checkpoint | None:
            try:
                made = self._places.write(ready(), ticket, places)
            except BaseException as error:
                self.ended(ticket, staged.step, staged.tag, None, error)
                raise
            self._told(staged, ticket, made)
            durable()
            return made

        before = self._under_way[-1][0] if self._under_way else None
        saving = Saving(work, ready, before, self._one_ended, snapshot.tag)
        # known before it begins: Ctrl-C may come between any two lines
        self._under_way.append((saving, into))
        saving.start()
        return saving

    def _free_set(self) -> StagingSet:
        if len(self._under_way) == len(self._staging.sets):
            self._end_oldest()
        used = [id(into) for _, into in self._under_way]
        return next(s for s in self._staging.sets if id(s) not in used)

    def _end_oldest(self) -> None:
        saving, _ = self._under_way[0]
        saving.wait()
        del self._under_way[0]
        if saving.error is not None:
            self._failures.append(saving.error)

    def wait(self) -> None:
        """Returns when nothing is being written; raises nothing of it."""
        self._forget_parent()
        while self._under_way:
            self._end_oldest()

    def failures(self) -> list[BaseException]:
        """What saves failed with that ended and were not asked for yet, oldest first."""
        self._forget_parent()
        while self._under_way and not self._under_way[0][0].running:
            self._end_oldest()
        failures, self._failures = self._failures, []
        return failures

    @property
    def copies_beside(self) -> bool:
        """Whether `guard` has something to wait for."""
        return self._staging.copies_beside

    def guard(self) -> None:
        """As `Staging.guard`."""
        self._staging.guard()

    def _forget_parent(self) -> None:
        """In a forked child: the saves, and the memory that they read, are the parent's."""
        if self._process != os.getpid():
            self._begin()
