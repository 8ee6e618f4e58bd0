"""The directory of one run: its checkpoints are found, written, pinned and retired here."""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from actckpt.checkpoint.commit import commit
from actckpt.checkpoint.discovery import Checkpoint, Found, discover, newest_of
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.frozen_base import FrozenBase
from actckpt.checkpoint.frozen_files import sweep
from actckpt.checkpoint.lock import DirectoryLock
from actckpt.checkpoint.names import PINNED
from actckpt.checkpoint.retention import Keep, clean, retire
from actckpt.checkpoint.setting_aside import set_aside
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.checkpoint.verification import verify_files
from actckpt.errors import CheckpointError, CheckpointFormatError, CheckpointSaveError
from actckpt.resuming.journal_writer import JournalWriter

logger = logging.getLogger("actckpt")

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class RunDirectory:
    """Checkpoints of one run, and the right to write more of them.

    Args:
        path: absolute; made when it is first written.
        keep: which checkpoints stay.
        verify: what is read back before a save counts, as for `verify_files`.
        fresh: what is there goes into a folder of its own before anything is written.
        beside: another directory of the run is the durable one, and has the journal.

    Attributes:
        journal: of the steps between the checkpoints; see `actckpt.resuming.journal`.
        serial: the largest of any checkpoint that was seen.
        damaged: names of checkpoints that were seen to be; they keep no sound one from staying.
        in_use: how many read a checkpoint, by its name; it stays meanwhile.
    """

    def __init__(
        self,
        path: str,
        files: Files,
        keep: Keep,
        verify: str,
        *,
        fresh: bool = False,
        beside: bool = False,
    ) -> None:
        self.path = path
        self.files = files
        self.keep = keep
        self._verify = verify
        self._fresh = fresh
        self._beside = beside
        # whether this run has said what the checkpoints that it found are to it
        self._taken_up = False
        # names of those that it made or went on from; only they are ever retired
        self._own: set[str] = set()
        self._seen: set[str] = set()
        # the largest seen: one that cannot be read for a moment must not be taken for older
        self.serial = 0
        # of entries that were found last, whether one cannot be read, and may name what it shares
        self._unread = False
        self._base = FrozenBase(files, path)
        self._lock: DirectoryLock | None = None
        self._warned = False
        self.journal = JournalWriter(files, path)
        self.damaged: set[str] = set()
        self.in_use: Counter[str] = Counter()
        # whether something of a save or a deletion that failed may lie about
        self._untidy = False

    def meet(self) -> bool:
        """Whether it can be used, once whoever writes there has met; every one of them asks."""
        return True

    def find(self) -> Found:
        """The checkpoints newest first, and what is named as one and cannot be used."""
        found = discover(self.files, self.path)
        self._seen = {c.path.name for c in found.checkpoints}
        self._unread = bool(found.skipped)
        self.serial = max([self.serial, *(c.manifest.serial for c in found.checkpoints)])
        return found

    def saw(self, checkpoint: Checkpoint) -> None:
        """One has come here since `find`."""
        self._seen.add(checkpoint.path.name)
        self.serial = max(self.serial, checkpoint.manifest.serial)

    def take_up(self) -> None:
        """Makes sure, once, that what this run will write is not mixed with another's.

        Raises:
            CheckpointError: there are checkpoints, and the run did not go on from any.
            CheckpointSaveError: they could not be moved away, as ``fresh`` asks.
        """
        if self._taken_up:
            return
        if self._fresh:
            self._acquire()
            set_aside(self.files, self.path)
            self._taken_up = True
            return
        try:
            found = self.find()
        except CheckpointError:
            return  # nothing is written nor retired before it can be listed
        if found.checkpoints or found.skipped:
            steps = [c.step for c in found.checkpoints]
            newest = f", the newest of step {steps[0]}" if steps else ", none of them usable"
            raise CheckpointError(
                f"{self.path} holds {len(steps) + len(found.skipped)} checkpoints{newest}, and "
                "this run did not go on from there: its own would be taken for newer ones. Call "
                "resume() first (or restore()), choose another directory, or pass fresh=True, "
                "which moves them into a dated folder beside them. Nothing was changed"
            )
        self._taken_up = True

    def go_on(self, *, whole: bool = True) -> None:
        """This run has been put back to one of the checkpoints that were found last.

        Args:
            whole: all of it, so that those are its own from now on.
        """
        self._taken_up = self._taken_up or not self._fresh
        if whole:
            self._own |= self._seen

    def decided(self, call: str, decide: Callable[[], Any]) -> Any:
        """What is decided for whoever writes there; every one of them asks."""
        return decide()

    def of_step(self, step: int | None) -> Checkpoint:
        """The newest checkpoint of a step; None is the newest of all.

        Raises:
            CheckpointError: there is none.
        """
        return newest_of(self.find().checkpoints, step, self.path)

    def ticket(self, step: int) -> int:
        """What tells the save that is begun now from others, to whom there is to be told."""
        return 0

    def decline(self, ticket: int, error: BaseException) -> None:
        """Nothing comes of a save that was begun."""

    def write(self, snapshot: Snapshot, ticket: int = 0) -> Checkpoint:
        """A durable, verified checkpoint; those that nothing keeps any more are gone then.

        Raises:
            CheckpointSaveError: none was made, and the earlier ones are as before.
            CheckpointError: somebody else writes into this directory.
        """
        self._acquire()
        if self._untidy:
            self._clean()
        try:
            found = self.find()
        except CheckpointError as error:
            raise CheckpointSaveError(
                f"step {snapshot.step} could not be saved: {error}. Earlier checkpoints are as "
                "before; remove the cause and save again"
            ) from error
        self._untidy = True
        if not self._beside:
            self.journal.saving(self.serial + 1, snapshot.step)
        made = commit(
            self.files,
            self.path,
            snapshot,
            serial=self.serial + 1,
            verify=self._verify,
            base=self._base,
        )
        self._untidy = False
        self.serial += 1
        self._own.add(made.path.name)
        self._retire((made, *found.checkpoints))
        return made

    def is_sound(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is still there, as it was written."""
        try:
            verify_files(self.files, str(checkpoint.path), self._verify)
        except CheckpointFormatError:
            self.damaged.add(checkpoint.path.name)
            return False
        except CheckpointError:
            return False  # it cannot be told
        return True

    def _retire(self, checkpoints: tuple[Checkpoint, ...]) -> None:
        """Deletes what nothing keeps; the first is new and verified, so failing is no loss."""
        sound = [c for c in checkpoints if c.path.name in self._own - self.damaged]
        kept = {c.path for c in self.keep(sound)}
        doomed = [c for c in sound if c.path not in kept and not self.in_use[c.path.name]]
        if doomed:
            self._warn_of_unreported(checkpoints)
        try:
            self._delete(doomed, [c for c in checkpoints if c not in doomed])
        except OSError as error:
            self._untidy = True
            logger.warning("actckpt: an old checkpoint could not be deleted: %s", error)
            return
        if doomed and not self._beside:
            left = [c for c in checkpoints if c not in doomed]
            self.journal.retired(
                min(c.step for c in left),
                checkpoints[0].step,
                frozenset(c.manifest.serial for c in left),
            )

    def _delete(self, doomed: list[Checkpoint], left: list[Checkpoint]) -> None:
        """Checkpoints, and the frozen tensors that only they have named."""
        retire(self.files, self.path, doomed)
        if not self._unread:
            sweep(self.files, self.path, [c.manifest for c in left])

    def _warn_of_unreported(self, checkpoints: tuple[Checkpoint, ...]) -> None:
        """Says once that nothing is kept for being best: no checkpoint says how good it is."""
        if self.keep.best is None or self._warned:
            return
        metric = self.keep.best[0]
        if any(metric in c.metrics for c in checkpoints):
            return
        self._warned = True
        reported = ", ".join(sorted({name for c in checkpoints for name in c.metrics})) or "none"
        logger.warning(
            "actckpt: keep_best goes by %s, which no checkpoint in %s has (metrics there: %s); "
            "older ones are deleted all the same. Report it with step(metrics=) or save(metrics=)",
            metric,
            self.path,
            reported,
        )

    def pin(self, step: int, pinned: bool) -> None:
        """Keeps the newest checkpoint of a step whatever the retention says, or no longer.

        Raises:
            CheckpointError: there is no checkpoint of that step, or somebody else writes here.
        """
        name = self.of_step(step).path.name
        self._acquire()
        marker = f"{self.path}/{PINNED}{name}"
        try:
            if pinned and self.files.status(marker) is None:
                with self.files.writing(marker):
                    pass
            elif not pinned:
                self.files.remove_tree(marker)
            self.files.sync_directory(self.path)
        except OSError as error:
            raise CheckpointSaveError(f"step {step} could not be pinned: {error}") from error

    @property
    def held(self) -> bool:
        """Whether the right to write there is this run's."""
        return self._lock is not None and self._lock.held

    def acquire(self) -> None:
        """Makes the directory, and the right to write there, this run's.

        Raises:
            CheckpointError: somebody else has it.
            CheckpointSaveError: it cannot be made or written.
        """
        self._acquire()

    def _acquire(self) -> None:
        if self._lock is not None and self._lock.held:
            return
        try:
            self.files.make_directories(self.path)
            self._lock = DirectoryLock(self.files, self.path)
            try:
                # the last writer may have been killed before it was known that its names last
                self.files.sync_directory(self.path)
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise CheckpointSaveError(
                f"{self.path} cannot be written: {error}. Choose another directory, or remove the "
                "cause"
            ) from error
        self._clean()

    def _clean(self) -> None:
        """Deletes leftovers; those that are still there are tried again by the next save."""
        try:
            clean(self.files, self.path)
            self._untidy = False
        except OSError as error:
            self._untidy = True
            logger.warning("actckpt: leftovers in %s could not be deleted: %s", self.path, error)

    def acquire_unless_read_only(self) -> CheckpointSaveError | None:
        """As `acquire`; returns the error where nobody can write into what exists.

        Raises:
            CheckpointError: somebody else has it.
            CheckpointSaveError: something else is wrong.
        """
        return self._acquire_unless_read_only()

    def _acquire_unless_read_only(self) -> CheckpointSaveError | None:
        try:
            self._acquire()
        except CheckpointSaveError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _READ_ONLY:
                raise
            return error
        return None

    def release(self) -> None:
        """Lets others write."""
        try:
            self.journal.close()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None
