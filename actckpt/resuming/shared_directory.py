"""The directory of a run of many ranks: all write, one holds the lock and decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import CheckpointError, CheckpointSaveError
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.journal_writer import JournalWriter
from actckpt.sharded.committing import SaveTogether, decline
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.known import Known
from actckpt.sharded.step_names import StepNames


class SharedDirectory(RunDirectory):
    """As `RunDirectory`, on every rank of a run.

    Reading it for oneself asks nobody. What changes it, or decides for the run, every rank calls.
    """

    def __init__(
        self,
        path: str,
        files: Files,
        keep: Keep,
        verify: str,
        exchange: Exchange,
        *,
        fresh: bool = False,
    ) -> None:
        super().__init__(path, files, keep, verify, fresh=fresh)
        self.exchange = exchange
        self.journal = JournalWriter(files, path, exchange.rank)
        self._saves = 0
        self._names = StepNames()
        # by ticket, the keys of saves that others may still ask for
        self._keys: dict[int, str] = {}
        self._open: set[int] = set()
        self._may_write = False
        self._known = Known()

    # ---- what is decided for all

    def decided(self, call: str, decide: Callable[[], Any]) -> Any:
        """What the coordinator decides, on every rank that asks.

        Args:
            call: in which call of the user's, and what in it.

        Raises:
            CheckpointError: what it raised, on every rank.
        """
        exchange, calls = self.exchange, self.exchange.calls
        exchange.begin()
        if not exchange.is_coordinator:
            said = calls.hear(call)
            if "error" in said:
                raise CheckpointError(f"rank 0: {said['error']}")
            return said["decided"]
        question = calls.question(call)
        try:
            found = decide()
        except Exception as error:  # the others wait for a word of this rank, whatever it is
            calls.tell(question, {"error": str(error) or type(error).__name__})
            raise
        calls.tell(question, {"decided": found})
        return found

    def take_up(self) -> None:
        """As `RunDirectory.take_up`."""
        if not self._taken_up:
            self.decided("the first step or save", super().take_up)
            self._taken_up = True

    def acquire(self) -> None:
        """The right to write; where it cannot be had, the next save says so on every rank."""
        self.exchange.begin()

    def acquire_unless_read_only(self) -> CheckpointSaveError | None:
        """As `RunDirectory.acquire_unless_read_only`."""

        def decide() -> str:
            found = self._acquire_unless_read_only()
            return "" if found is None else str(found)

        said = self.decided("resume()", decide)
        self._may_write = not said
        return CheckpointSaveError(said) if said else None

    @property
    def held(self) -> bool:
        """Whether the right to write there is this run's, as far as this rank was told."""
        return super().held if self.exchange.is_coordinator else self._may_write

    # ---- saving

    def ticket(self, step: int) -> int:
        """The number of the next save, here alone: a rank may begin one more than others."""
        self._saves += 1
        self._keys[self._saves] = f"save/{self._names.next(step)}"
        self._open.add(self._saves)
        return self._saves

    def key(self, ticket: int) -> str:
        """What messages of a save are called."""
        return self._keys[ticket]

    def decline(self, ticket: int, error: BaseException) -> None:
        """This rank has nothing to write: the others are told."""
        if ticket in self._open:
            self._open.discard(ticket)
            self.exchange.begin()
            decline(self.exchange, self._keys[ticket], error)

    def write(self, snapshot: Snapshot, ticket: int = 0) -> Checkpoint:
        """A durable, verified checkpoint of all ranks.

        Raises:
            CheckpointSaveError: none was made, and the earlier ones are as before.
            CheckpointUnknownError: it cannot be said whether one was made.
        """
        self.exchange.begin()
        found: tuple[Checkpoint, ...] = ()
        if not self.exchange.is_coordinator:
            try:
                found = self.find().checkpoints
            except Exception as error:
                self.decline(ticket, error)
                raise CheckpointSaveError(
                    f"step {snapshot.step} could not be saved to {self.path}: {error}. Earlier "
                    "checkpoints are as before"
                ) from error
        self._open.discard(ticket)

        def prepare() -> int:
            nonlocal found
            self._acquire()
            if self._untidy:
                self._clean()
            found = self.find().checkpoints
            self._untidy = True
            return self.serial + 1

        def settled() -> None:
            for earlier in [number for number in self._keys if number < ticket]:
                self.exchange.forget(f"{self._keys.pop(earlier)}/")

        def begun(serial: int) -> None:
            self.journal.saving(serial, snapshot.step)

        made = SaveTogether(
            self.exchange,
            self.files,
            self.path,
            snapshot,
            self._known,
            key=self._keys[ticket],
            prepare=prepare,
            begun=begun,
            settled=settled,
            verify=self._verify,
        ).run()
        self.serial = made.manifest.serial
        self._may_write = True
        self._own.add(made.path.name)
        self._untidy = False
        self._retire((made, *found))
        return made

    def _delete(self, doomed: list[Checkpoint], left: list[Checkpoint]) -> None:
        if self.exchange.is_coordinator:
            super()._delete(doomed, left)

    def pin(self, step: int, pinned: bool) -> None:
        """As `RunDirectory.pin`; the coordinator does it, and need not be joined by others."""
        call = f"pin({step})" if pinned else f"pin({step}, False)"
        self.decided(call, lambda: super(SharedDirectory, self).pin(step, pinned))

    def release(self) -> None:
        """Lets others write, and nobody waits for this rank any more."""
        try:
            super().release()
        finally:
            self.exchange.end()

    def at(self, name: str) -> Path:
        """Where a checkpoint of that name is."""
        return Path(self.path) / name
