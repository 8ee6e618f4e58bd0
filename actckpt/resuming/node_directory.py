"""A faster folder of a run of many ranks: each node has one, and no rank sees all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from actckpt.checkpoint.discovery import Checkpoint, Skipped
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import CheckpointError, CheckpointSaveError
from actckpt.resuming.candidates import Candidate
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.journal_writer import JournalWriter
from actckpt.sharded.committing import decline
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.known import Known
from actckpt.sharded.node_reading import NodeReading, Spread
from actckpt.sharded.node_saving import NodeSave
from actckpt.sharded.nodes import Nodes

logger = logging.getLogger("actckpt")


class NodeDirectory(RunDirectory):
    """As `RunDirectory`, of the folder of this rank's node; `meet` comes first.

    Args:
        key_of: what the messages of a save are called, by its ticket.
        journal: of the run.
    """

    def __init__(
        self,
        path: str,
        files: Files,
        keep: Keep,
        verify: str,
        exchange: Exchange,
        key_of: Callable[[int], str],
        journal: JournalWriter,
        *,
        fresh: bool,
    ) -> None:
        super().__init__(path, files, keep, verify, fresh=fresh, beside=True)
        self._exchange = exchange
        self._key_of = key_of
        self._run_journal = journal
        self._known = Known()
        self._nodes: Nodes | None = None

    @property
    def nodes(self) -> Nodes:
        """Who sees which folder."""
        assert self._nodes is not None, "meet comes first"
        return self._nodes

    def meet(self) -> bool:
        """Finds out who sees which folder; False, and a warning, where a rank cannot write there.

        Every rank asks, and all get the same answer.
        """
        if self._nodes is None:
            try:
                self._nodes = Nodes(self._exchange, self.files, self.path)
            except CheckpointError as error:
                logger.warning("actckpt: no checkpoints go to %s: %s", self.path, error)
                return False
        return True

    def agreed(self, error: CheckpointError | None) -> None:
        """Raises on every rank what a rank has met.

        Raises:
            CheckpointError: that.
        """
        said = self._exchange.calls.gather(
            "the first use of tiers=", "" if error is None else str(error)
        )
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text:
                raise CheckpointError(f"rank {rank}: {text}")

    def take_up(self) -> None:
        """As `RunDirectory.take_up`, on every rank."""
        if self._taken_up:
            return
        error = None
        if self.nodes.leads:
            try:
                super().take_up()
            except CheckpointError as found:
                error = found
        self.agreed(error)
        self._taken_up = True

    def acquire(self) -> None:
        """The first rank of a node alone does, when it writes."""

    def decline(self, ticket: int, error: BaseException) -> None:
        """This rank has nothing to write: the others are told."""
        decline(self._exchange, self._key_of(ticket), error)

    def write(self, snapshot: Snapshot, ticket: int = 0) -> Checkpoint:
        """This node's part of a checkpoint of all ranks, and of the copies that it keeps.

        Raises:
            CheckpointError: none was made, or not on every node; the earlier ones are as before.
        """
        nodes = self.nodes
        found: tuple[Checkpoint, ...] = ()
        try:
            if nodes.leads:
                self._acquire()
                if self._untidy:
                    self._clean()
                found = self.find().checkpoints
                self._untidy = True
        except Exception as error:  # the others wait for a word of this rank, whatever it is
            self.decline(ticket, error)
            raise CheckpointSaveError(
                f"step {snapshot.step} could not be saved to {self.path}: {error}"
            ) from error

        def begun(serial: int) -> None:
            self._run_journal.saving(serial, snapshot.step)
            save.make_folder()

        save = NodeSave(
            nodes,
            self._exchange,
            self.files,
            self.path,
            snapshot,
            self._known,
            key=self._key_of(ticket),
            prepare=lambda: self.serial + 1,
            begun=begun,
            settled=lambda: None,
            verify=self._verify,
        )
        try:
            made = save.run()
        finally:
            # named here, and perhaps not everywhere
            if save.local:
                self._own.add(Path(save.local).name)
        self.serial = made.manifest.serial
        if nodes.leads:
            self._untidy = False
            self._retire((made, *found))
        return made

    # ---- coming back

    def candidates(
        self, needed: Callable[[str], Iterable[str]]
    ) -> tuple[list[Candidate], list[Skipped]]:
        """What the nodes have together, and what of it is not all there; on every rank the same.

        Args:
            needed: as for `NodeReading.bring`.
        """
        checkpoints: tuple[Checkpoint, ...] = ()
        try:
            checkpoints = self.find().checkpoints
        except CheckpointError as error:  # then it has nothing, and others may
            logger.warning("actckpt: %s", error)
        reading = NodeReading(self.nodes, self._exchange, self.files, self.path)
        found: list[Candidate] = []
        lost: list[Skipped] = []
        for spread in reading.look(checkpoints):
            manifest = spread.manifest
            name = f"{self.path}/{next(iter(spread.names.values()))}"
            if spread.lost:
                ranks = ", ".join(map(str, spread.lost[:8]))
                lost.append(Skipped(name, f"the files of rank {ranks} are on no node"))
                continue

            def get(spread: Spread = spread) -> Checkpoint:
                return Checkpoint(reading.bring(spread, needed), spread.manifest)

            found.append(Candidate(name, manifest.step, manifest.serial, get))
        return found, lost
