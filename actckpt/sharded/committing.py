"""A checkpoint that many ranks write together: every rank votes, one decides, all hear of it.

1. Every rank says what it holds. The coordinator answers who writes what, and where. What is as
   at the save before is said by its digest alone (`planning`).
2. Every rank writes its share into files of its own, reads them back, and votes with the size and
   checksum of its manifest, and with what it was told to do.
3. The coordinator, which alone holds the directory's lock, looks at every file of every rank,
   writes the root manifest, renames, and says so.

Without every vote there is no checkpoint. A rank that has voted and hears nothing does not know,
and looks at the disk.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actckpt.checkpoint.commit import abandon, check_space, free_name
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import MANIFEST, SAVING, rank_file, unique
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.checkpoint.verification import checked, read_manifest
from actckpt.errors import CheckpointError, CheckpointSaveError, CheckpointUnknownError
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.known import Known
from actckpt.sharded.share_writing import why_not, write_share
from actckpt.sharded.sight import look

logger = logging.getLogger("actckpt")


def decline(exchange: Exchange, key: str, error: BaseException) -> None:
    """Says that this rank takes no part in a save, which fails for that.

    Raises:
        CheckpointError: nobody can be told.
    """
    said = _failure(error)
    exchange.tell_all(f"{key}/layout", said)
    if exchange.is_coordinator:
        exchange.calls.saves.add(key)
        for rank in range(exchange.world_size):
            exchange.tell(_plan_key(key, 0, rank), said)


def _plan_key(key: str, number: int, rank: int) -> str:
    """Of the coordinator's answer to a rank: what it asks, one after another, and then the plan."""
    return f"{key}/plan/{number}/of/{rank}"


def _failure(error: BaseException) -> dict[str, Any]:
    return {"failed": _reason(error)}


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


class SaveTogether:
    """One save of one rank.

    Args:
        known: of the saves before, the same object in all of them.
        key: of the save, the same on every rank and of no other save.
        prepare: called by the coordinator, with the lock or an error; returns the serial of the
            checkpoint that is to be.
        begun: called on every rank with that serial, before this rank writes.
        settled: called once no rank asks any more what this one said in saves before.
        verify: what is read back, as for `verify_files`.
    """

    def __init__(
        self,
        exchange: Exchange,
        files: Files,
        directory: str,
        snapshot: Snapshot,
        known: Known,
        *,
        key: str,
        prepare: Callable[[], int],
        begun: Callable[[int], None],
        settled: Callable[[], None],
        verify: str,
    ) -> None:
        self._exchange = exchange
        self._files = files
        self._directory = directory
        self._snapshot = snapshot
        self._holding, self._planner = known.holding, known.planner
        self._key = key
        self._what = f"a save of step {snapshot.step}"
        self._prepare = prepare
        self._begun = begun
        self._settled = settled
        self._serial = 0
        self._verify = verify
        self._temporary = ""
        # by rank, how many answers it had, of the coordinator
        self._asked = [0] * exchange.world_size
        # whether there is a checkpoint under its name, sound or not
        self._named = False
        # why this rank voted against it
        self._cause: Exception | None = None

    def run(self) -> Checkpoint:
        """The checkpoint, once every rank's share is durable and verified.

        Raises:
            CheckpointSaveError: none was made, and every rank is told so.
            CheckpointUnknownError: it cannot be said whether one was made.
        """
        coordinates = self._exchange.is_coordinator
        try:
            return self._coordinate() if coordinates else self._take_part()
        except CheckpointUnknownError:
            raise
        except CheckpointSaveError as error:
            if not coordinates:
                raise
            # it says what it tells the others
            raise self._failed(_reason(error)) from error.__cause__ or error
        except Exception as error:  # of whatever kind, on the other ranks it is this one
            raise self._failed(_reason(error)) from error

    # ---- the coordinator

    def _coordinate(self) -> Checkpoint:
        exchange, key = self._exchange, self._key
        planned = False
        try:
            exchange.calls.begin_save(key)
            self._serial = self._prepare()
            self._say_layout()
            said = exchange.calls.hear_all_in_save(f"{key}/layout", self._what)
            # who says what it holds has heard what became of the save before; who declines may
            # wait for that in another thread
            if all("layout" in message for message in said):
                self._settled()
            self._raise_failures(dict(enumerate(said)))
            self._check_alike(said)
            tasks = self._planner.plan(said, self._fetch, self._ask)
            name = free_name(self._files, self._directory, self._snapshot.step)
            save = secrets.token_hex(8)
            self._temporary = f"{self._directory}/{unique(SAVING, name)}"
            self._files.make_directory(self._temporary)
            # a rank on another machine is to find it
            self._files.sync_directory(self._directory)
            where = {
                "temporary": Path(self._temporary).name,
                "name": name,
                "serial": self._serial,
                "save": save,
            }
            plans = [where | self._planner.reply(rank, said) for rank in range(len(said))]
            for rank, (asked, plan) in enumerate(zip(self._asked, plans, strict=True)):
                exchange.tell(_plan_key(key, asked, rank), plan)
            planned = True
            self._vote(plans[0])
            votes = exchange.hear_all(f"{key}/vote")
            self._raise_failures(dict(enumerate(votes)))
            self._check_tasks(votes, tasks)
            made = self._decide(votes, name, save)
        except BaseException as error:
            self._give_up(error, planned)
            raise
        try:
            exchange.tell(f"{key}/verdict", {"manifest": made.manifest.to_bytes().decode()})
        except CheckpointError as error:
            # there it is; they look at the disk
            logger.warning("actckpt: the other ranks could not be told of %s: %s", made.path, error)
        return made

    def _check_alike(self, said: Sequence[dict[str, Any]]) -> None:
        """That all save the same moment."""
        for rank, message in enumerate(said):
            for what in ("step", "tag"):
                if message[what] != said[0][what]:
                    raise CheckpointSaveError(
                        f"rank 0 saves {what} {said[0][what]!r} and rank {rank} "
                        f"{message[what]!r}: every rank has to save at the same step"
                    )

    def _fetch(self, rank: int, what: str) -> str:
        text: str = self._exchange.hear(f"{self._key}/{what}/of/{rank}", (rank,))
        return text

    def _ask(self, asked: dict[int, list[str]]) -> dict[int, Any]:
        """What ranks answer."""
        exchange, key = self._exchange, self._key
        keys = {}
        for rank, what in asked.items():
            number = self._asked[rank]
            exchange.tell(_plan_key(key, number, rank), {"ask": what})
            keys[rank] = f"{key}/answer/{number}/of/{rank}"
            self._asked[rank] += 1
        if exchange.rank in asked:
            exchange.tell(keys[exchange.rank], self._holding.answer(asked[exchange.rank]))
        found = exchange.hear_from(keys)
        self._raise_failures(found)
        return found

    def _check_tasks(self, votes: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
        """That all did what this save's plan gives them."""
        for rank, (vote, task) in enumerate(zip(votes, tasks, strict=True)):
            if vote["task"] != task:
                raise CheckpointSaveError(
                    f"rank {rank} wrote by plan {vote['task']:.8}, and this save has {task:.8}"
                )

    def _decide(self, votes: Sequence[dict[str, Any]], name: str, save: str) -> Checkpoint:
        snapshot = self._snapshot
        entries = {
            rank_file(rank): FileEntry(vote["size_bytes"], vote["checksum"])
            for rank, vote in enumerate(votes)
        }
        manifest = Manifest(
            step=snapshot.step,
            serial=self._serial,
            saved_at_s=time.time(),
            tag=snapshot.tag,
            metrics=snapshot.metrics,
            fingerprint=snapshot.fingerprint,
            versions=snapshot.versions,
            files=entries,
            tensors={},
            world_size=self._exchange.world_size,
            data_bytes=self._seen(votes, entries, save),
            save=save,
        )
        return Checkpoint(self._named_as(name, manifest), manifest)

    def _seen(
        self, votes: Sequence[dict[str, Any]], entries: Mapping[str, FileEntry], save: str
    ) -> int:
        """The size of all files of all ranks, each of which is as its rank says."""
        # seen from here: what a rank wrote on a disk of its own machine is no part of this
        return look(self._files, self._temporary, entries, save, self._planner.expected)

    def _named_as(self, name: str, manifest: Manifest) -> Path:
        """Where the checkpoint is, which is one from now on."""
        files, temporary, snapshot = self._files, self._temporary, self._snapshot
        with files.writing(f"{temporary}/{MANIFEST}") as sink:
            sink.write(manifest.to_bytes())
        files.sync_directory(temporary)
        final = f"{self._directory}/{name}"
        entry = FileEntry(sink.written_bytes, sink.checksum)
        files.rename(temporary, final)
        self._named, self._temporary = True, ""
        try:
            files.sync_directory(self._directory)
            with checked(files, f"{final}/{MANIFEST}", entry):
                pass  # under its name, what it says
        except Exception as error:
            raise CheckpointUnknownError(
                f"step {snapshot.step} has been written to {final}, and whether it is durable is "
                f"not known: {error}. Verify it before you rely on it; earlier checkpoints are as "
                "before"
            ) from error
        return Path(final)

    def _give_up(self, error: BaseException, planned: bool) -> None:
        """Tells everybody, as far as the store can be reached, and cleans up."""
        said = {"unknown": _reason(error)} if self._named else _failure(error)
        try:
            if not planned:
                self._holding.forget()
                for rank, asked in enumerate(self._asked):
                    self._exchange.tell(_plan_key(self._key, asked, rank), said)
            self._exchange.tell(f"{self._key}/verdict", said)
        except CheckpointError as unheard:
            error.add_note(f"The other ranks could not be told: {unheard}")
        if self._temporary:
            abandon(self._files, self._temporary)

    # ---- every other rank

    def _take_part(self) -> Checkpoint:
        exchange, key = self._exchange, self._key
        try:
            self._say_layout()
            plan = self._plan()
        except BaseException:
            self._holding.forget()
            raise
        self._settled()
        final = f"{self._directory}/{plan['name']}"
        self._temporary = f"{self._directory}/{plan['temporary']}"
        self._vote(plan)
        self._before_verdict(plan)
        try:
            verdict = exchange.hear(f"{key}/verdict", (0,))
        except CheckpointError as error:
            return self._look(final, plan["save"], error)
        if "failed" in verdict:
            raise self._failed(verdict["failed"]) from self._cause
        if "unknown" in verdict:
            raise CheckpointUnknownError(verdict["unknown"])
        # the coordinator has read it back; a file server may show it here later
        manifest = Manifest.from_bytes(verdict["manifest"].encode(), f"{final}/{MANIFEST}")
        return Checkpoint(Path(final), manifest)

    def _before_verdict(self, plan: dict[str, Any]) -> None:
        """What there is to do between the vote and the verdict: nothing."""

    def _plan(self) -> dict[str, Any]:
        """What the coordinator tells, once it has asked what it wants to know."""
        exchange, key = self._exchange, self._key
        for number in itertools.count():
            told: dict[str, Any] = exchange.calls.hear_in_save(
                _plan_key(key, number, exchange.rank), key, self._what
            )
            if "failed" in told:
                raise self._failed(told["failed"])
            if "ask" not in told:
                return told
            try:
                answer = self._holding.answer(told["ask"])
            except BaseException as error:
                exchange.tell_all(f"{key}/answer/{number}", _failure(error))
                raise
            exchange.tell_all(f"{key}/answer/{number}", answer)
        raise AssertionError

    def _look(self, final: str, save: str, error: CheckpointError) -> Checkpoint:
        """What the disk says, where nobody else does."""
        try:
            manifest = read_manifest(self._files, final)
        except CheckpointError:
            manifest = None
        if manifest is not None and manifest.save == save:
            return Checkpoint(Path(final), manifest)
        raise CheckpointUnknownError(
            f"step {self._snapshot.step} may have been saved to {final}, or not: {error}. Every "
            "file of this rank is written; look whether that directory appears. Earlier "
            "checkpoints are as before"
        ) from error

    # ---- all

    def _say_layout(self) -> None:
        snapshot, exchange, key = self._snapshot, self._exchange, self._key
        try:
            said = self._holding.say(snapshot.items, exchange.world_size)
        except BaseException as error:
            exchange.tell_all(f"{key}/layout", _failure(error))
            raise
        if self._holding.is_new:
            # who hears that it is there may fetch it
            for what, text in self._holding.in_full().items():
                exchange.tell_all(f"{key}/{what}", text)
        exchange.tell_all(f"{key}/layout", {"step": snapshot.step, "tag": snapshot.tag, **said})

    def _vote(self, plan: dict[str, Any]) -> None:
        try:
            assignment, task = self._holding.take(plan)
            self._begun(plan["serial"])
            check_space(self._files, self._directory, self._snapshot)
            share, entry = write_share(
                self._files,
                self._temporary,
                self._snapshot,
                assignment,
                rank=self._exchange.rank,
                save=plan["save"],
                verify=self._verify,
            )
            vote: dict[str, Any] = {
                "size_bytes": entry.size_bytes,
                "checksum": entry.checksum,
                "data_bytes": share.size_bytes,
                "task": task,
            }
        except Exception as error:  # memory, a device: all are to say the same of this save
            said = why_not(self._files, self._temporary, error)
            vote, self._cause = {"failed": said or _reason(error)}, error
        except BaseException as error:
            self._exchange.tell_all(f"{self._key}/vote", _failure(error))
            raise
        self._exchange.tell_all(f"{self._key}/vote", vote)

    def _raise_failures(self, said: Mapping[int, dict[str, Any]]) -> None:
        failed = {rank: m["failed"] for rank, m in said.items() if "failed" in m}
        for rank, reason in failed.items():
            more = f" (and of {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            raise CheckpointSaveError(f"rank {rank}{more}: {reason}") from self._cause

    def _failed(self, reason: str) -> CheckpointSaveError:
        return CheckpointSaveError(
            f"step {self._snapshot.step} could not be saved to {self._directory}: {reason}. "
            "Earlier checkpoints are as before"
        )
