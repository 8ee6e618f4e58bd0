"""Where the checkpoints of one run lie: its directory, faster folders, stores behind it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from actckpt.checkpoint.discovery import Checkpoint, Found, newest_of
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import local_path, refuse_file
from actckpt.checkpoint.object_store import ObjectStore, Stored
from actckpt.checkpoint.retention import Keep
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import ArgumentError, CheckpointError, CheckpointSaveError
from actckpt.resuming.cadence import Cadence, Every
from actckpt.resuming.candidates import Candidate, Candidates
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.journal_writer import JournalWriter
from actckpt.resuming.tier import Tier
from actckpt.resuming.uploads import Uploads

logger = logging.getLogger("actckpt")


class Beside(Protocol):
    """Who makes folders beside the durable directory; see `actckpt.resuming.company`."""

    ranked: bool

    @property
    def uploads(self) -> bool:
        """Whether this process copies checkpoints to stores."""

    def beside(
        self, path: str, keep: Keep, verify: str, main: RunDirectory, number: int, *, fresh: bool
    ) -> RunDirectory:
        """One of them."""

    def cadence_beside(self, every: Every, number: int) -> Cadence:
        """When a save is due there."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of this machine that checkpoints are written into, and when."""

    directory: RunDirectory
    cadence: Cadence


class Places:
    """The checkpoints of one run, wherever they lie, and the right to write more of them.

    The same state has the same serial everywhere, and a newer one a larger: so a place that lags
    behind never wins.

    Args:
        directory: the run's durable directory, which has the journal.
        cadence: of that.
        verify: what is read back elsewhere, as for `verify_files`.
        fresh: other folders, too, begin anew.
        company: who makes them, and says when one of them is due.

    Attributes:
        main: the durable directory.

    Raises:
        ArgumentError: a tier lies in the place of another, or is no folder.
    """

    def __init__(
        self,
        directory: RunDirectory,
        cadence: Cadence,
        tiers: Sequence[Tier] = (),
        verify: str = "full",
        *,
        fresh: bool = False,
        company: Beside,
    ) -> None:
        self.main = Place(directory, cadence)
        # by ticket, the folders that others wait for this rank's part in
        self._awaited: dict[int, list[RunDirectory]] = {}
        self._ranked = company.ranked
        self._has_stores = any(tier.is_store for tier in tiers)
        self._fresh = fresh
        self._beside: list[Place] = []
        self._stores: list[Uploads] = []
        self._stores_taken_up = False
        # made in the durable directory by this process
        self._newest: Checkpoint | None = None
        for tier in tiers:
            if tier.is_store and not company.uploads:
                continue
            if tier.is_store:
                store = ObjectStore(str(tier.path), verify)
                uploads = Uploads(store, Cadence(tier.every), tier.keep, self._in_use)
                self._stores.append(uploads)
                continue
            at = local_path(tier.path).absolute()
            refuse_file(at)
            if str(at) in [p.directory.path for p in self.all]:
                raise ArgumentError(f"a tier needs a folder of its own; {at} is used already")
            number = len(self._beside)
            made = company.beside(str(at), Keep(tier.keep), verify, directory, number, fresh=fresh)
            self._beside.append(Place(made, company.cadence_beside(tier.every, number)))

    @property
    def path(self) -> str:
        """Of the durable directory."""
        return self.main.directory.path

    @property
    def files(self) -> Files:
        """How files are read and written."""
        return self.main.directory.files

    @property
    def keep(self) -> Keep:
        """Which checkpoints stay in the durable directory."""
        return self.main.directory.keep

    @property
    def journal(self) -> JournalWriter:
        """Of the run."""
        return self.main.directory.journal

    @property
    def all(self) -> tuple[Place, ...]:
        """Every folder, the durable one first."""
        return (self.main, *self._beside)

    def due(self, step: int) -> tuple[Place, ...]:
        """Where a save is due after a step."""
        return tuple(p for p in self.all if p.cadence.due(step))

    def of(self, checkpoint: Checkpoint) -> Place:
        """The folder that a checkpoint lies in."""
        (found,) = (p for p in self.all if p.directory.path == os.fspath(checkpoint.path.parent))
        return found

    @property
    def beside(self) -> tuple[Place, ...]:
        """The faster folders."""
        return tuple(self._beside)

    @property
    def stores(self) -> tuple[Uploads, ...]:
        """The stores behind, where this process copies to them."""
        return tuple(self._stores)

    def meet(self) -> None:
        """Leaves out folders that cannot be used."""
        self._beside = [place for place in self._beside if place.directory.meet()]

    # ---- reading

    def find(self) -> Found:
        """The checkpoints of all folders, newest first, and what cannot be used.

        Raises:
            CheckpointError: the durable directory cannot be listed.
        """
        found = [self.main.directory.find()]
        for place in self._beside:
            try:
                found.append(place.directory.find())
            except CheckpointError as error:
                logger.warning("actckpt: %s", error)
        if not self._beside:
            return found[0]
        checkpoints = [c for f in found for c in f.checkpoints]
        # of equal ones the durable one is first: the sort is stable
        checkpoints.sort(key=lambda c: (c.manifest.serial, c.step), reverse=True)
        return Found(tuple(checkpoints), tuple(s for f in found for s in f.skipped))

    def candidates(self) -> Candidates:
        """The same, and what stores have, which is brought here where it is asked for."""
        local = self.find()
        found = [_local(c) for c in local.checkpoints]
        skipped, unreached = [*local.skipped], []
        for uploads in self._stores:
            try:
                stored, bad = uploads.look()
            except CheckpointError as error:
                logger.warning("actckpt: %s", error)
                unreached.append(str(error))
                continue
            # whatever this run goes on from, what it saves is newer than all that was seen
            directory = self.main.directory
            directory.serial = max([directory.serial, *(s.manifest.serial for s in stored)])
            skipped += bad
            found += [
                Candidate(
                    f"{uploads.store.url}/{s.name}",
                    s.manifest.step,
                    s.manifest.serial,
                    partial(self._fetch, uploads.store, s),
                )
                for s in stored
            ]
        if self._stores:
            # of equal ones those of this machine first
            found.sort(key=lambda c: c.serial, reverse=True)
        return Candidates(tuple(found), tuple(skipped), tuple(unreached))

    def fetch(self, url: str, name: str) -> Checkpoint:
        """A checkpoint of a store that was looked into, brought to the durable directory.

        Raises:
            CheckpointError: as `ObjectStore.fetch`.
        """
        uploads = next(u for u in self._stores if u.store.url == url)
        return self._fetch(uploads.store, next(s for s in uploads.seen if s.name == name))

    def _fetch(self, store: ObjectStore, stored: Stored) -> Checkpoint:
        self.main.directory.acquire()
        logger.info("actckpt: bringing %s/%s to %s", store.url, stored.name, self.path)
        fetched = store.fetch(stored, self.files, self.path)
        self.main.directory.saw(fetched)
        return fetched

    def of_step(self, step: int | None) -> Candidate:
        """The newest checkpoint of a step; None is the newest of all.

        Raises:
            CheckpointError: there is none.
        """
        return newest_of(self.candidates().found, step, self.path)

    def pin(self, step: int, pinned: bool) -> None:
        """Keeps the newest checkpoint of a step whatever the retention says, or no longer.

        Raises:
            CheckpointError: there is no checkpoint of that step, or somebody else writes here.
        """
        having = [c for c in self.find().checkpoints if c.step == step] if self._beside else []
        place = self.of(having[0]) if having else self.main
        place.directory.pin(step, pinned)

    # ---- whose they are

    def take_up(self) -> None:
        """As `RunDirectory.take_up`, of every place.

        Raises:
            CheckpointError: there are checkpoints, and the run did not go on from any.
        """
        self.meet()
        for place in self.all:
            place.directory.take_up()
        if self._has_stores and not self._stores_taken_up:
            self.main.directory.decided("the first use of tiers=", self._take_up_stores)
        self._stores_taken_up = True

    def _take_up_stores(self) -> None:
        for uploads in self._stores:
            stored, skipped = uploads.look()
            if stored or skipped:
                raise CheckpointError(
                    f"{uploads.store.url} holds {len(stored) + len(skipped)} checkpoints, and this "
                    "run did not go on from there. Call resume() first, or choose another "
                    "address" + (": fresh=True moves nothing in a store" if self._fresh else "")
                )

    def go_on(self, *, whole: bool = True) -> None:
        """As `RunDirectory.go_on`, of every place."""
        for place in self.all:
            place.directory.go_on(whole=whole)
        for uploads in self._stores if whole else ():
            uploads.go_on()
        self._stores_taken_up = self._stores_taken_up or not self._fresh

    @property
    def held(self) -> bool:
        """Whether the right to write is this run's."""
        return self.main.directory.held

    def acquire(self) -> None:
        """As `RunDirectory.acquire`, of every folder; that of one beside may fail."""
        self.main.directory.acquire()
        for place in self._beside:
            try:
                place.directory.acquire()
            except CheckpointError as error:
                logger.warning("actckpt: %s", error)

    def acquire_unless_read_only(self) -> CheckpointSaveError | None:
        """As `RunDirectory.acquire_unless_read_only`, of the durable directory."""
        read_only = self.main.directory.acquire_unless_read_only()
        if read_only is None:
            self.acquire()
        return read_only

    def release(self) -> None:
        """Lets others write."""
        for place in self.all:
            place.directory.release()

    # ---- writing

    def ticket(self, step: int, places: Sequence[Place]) -> int:
        """As `RunDirectory.ticket`, of a save in these."""
        number = self.main.directory.ticket(step)
        self._awaited[number] = [place.directory for place in places]
        return number

    def decline(self, ticket: int, error: BaseException) -> None:
        """As `RunDirectory.decline`, wherever this rank's part was not begun."""
        for directory in self._awaited.pop(ticket, ()):
            directory.decline(ticket, error)

    def _begins(self, ticket: int, directory: RunDirectory) -> None:
        """From now on the folder itself tells the others what comes of it."""
        if directory in (awaited := self._awaited.get(ticket, [])):
            awaited.remove(directory)

    def write(self, snapshot: Snapshot, ticket: int, places: Sequence[Place]) -> Checkpoint | None:
        """A checkpoint in each of these; that of the durable directory if it is one of them.

        What goes wrong beside it is a warning: then None, where there is no checkpoint.

        Args:
            ticket: as of `RunDirectory.ticket`.

        Raises:
            CheckpointError: as `RunDirectory.write`, of the durable directory.
        """
        serial = max(p.directory.serial for p in self.all)
        for place in self.all:
            place.directory.serial = serial
        if self.main not in places:
            if not self._ranked:  # ranks say so themselves, once they know the serial
                self.journal.saving(serial + 1, snapshot.step)
            return self._written_beside(snapshot, ticket, places)
        self._begins(ticket, self.main.directory)
        try:
            made = self.main.directory.write(snapshot, ticket)
        except CheckpointError:
            self._written_beside(snapshot, ticket, places)
            raise
        self._written_beside(snapshot, ticket, places)
        self._newest = made
        for uploads in self._stores:
            uploads.offer(made)
        return made

    def _written_beside(
        self, snapshot: Snapshot, ticket: int, places: Sequence[Place]
    ) -> Checkpoint | None:
        """In each of these but the durable directory; what fails is no error of the run."""
        made = None
        for place in self._beside:
            if place in places:
                self._begins(ticket, place.directory)
                try:
                    made = place.directory.write(snapshot, ticket)
                except CheckpointError as error:
                    logger.warning("actckpt: %s", error)
        return made

    def end_uploads(self) -> None:
        """Returns once the newest checkpoint of this process is in every store.

        Raises:
            CheckpointSaveError: it is not in one of them.
        """
        for uploads in self._stores:
            if self._newest is not None:
                uploads.offer(self._newest, last=True)
        for uploads in self._stores:
            uploads.wait()
        for uploads in self._stores:
            if uploads.error is not None:
                raise CheckpointSaveError(str(uploads.error)) from uploads.error

    def _in_use(self, name: str, in_use: bool) -> None:
        self.main.directory.in_use[name] += 1 if in_use else -1


def _local(checkpoint: Checkpoint) -> Candidate:
    return Candidate(
        checkpoint.path.name, checkpoint.step, checkpoint.manifest.serial, lambda: checkpoint
    )
