"""Which checkpoint many ranks go on from: the newest that each of them can read its share of.

What all ranks do for that they do over the store, none of it a collective of the process group: a
word of rank 0 of what there is; for every checkpoint that is tried the gatherings of
`actckpt.sharded.reading_once`, where ranks read together, and one of what came of it; one of the
names that ranks have, a second where these differ; one of whether what was read fits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from actckpt.checkpoint.discovery import Checkpoint, Skipped, newest_of
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.reading import read_state
from actckpt.checkpoint.verification import read_manifest
from actckpt.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError
from actckpt.resuming.candidates import Candidate
from actckpt.resuming.choosing import Chosen, none_of, nothing_but
from actckpt.resuming.from_one import by_names, cut
from actckpt.resuming.node_directory import NodeDirectory
from actckpt.resuming.places import Places
from actckpt.resuming.share import Like, Share, read_share
from actckpt.resuming.shared_directory import SharedDirectory
from actckpt.resuming.wrapper_prefix import renamed
from actckpt.sharded.calls import RanksApartError
from actckpt.sharded.layout import digest_of_tree
from actckpt.sharded.loading import ShareReading
from actckpt.sharded.passing import UnreadError, can_pass
from actckpt.sharded.reading_once import SAME, FilesOnce, ReadingOnce, different

logger = logging.getLogger("actckpt")


@dataclass(frozen=True, slots=True)
class _Lying:
    """One that may be gone on from, wherever it lies.

    Args:
        get: where it is on this rank's machine; brings it there; every rank asks.
        damaged: names of those of its place that are.
    """

    name: str
    step: int
    serial: int
    get: Callable[[], Path]
    damaged: set[str]


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is, as `Candidates`."""

    found: tuple[_Lying, ...]
    skipped: tuple[Skipped, ...]
    unreached: tuple[str, ...]


class TogetherChoice:
    """What every rank asks for its share of.

    Args:
        like: gives what `read_share` asks, of the objects as they are.
        model: without wrappers.
        joined: as for `read_share`.
    """

    def __init__(
        self,
        places: Places,
        like: Callable[[], Like],
        model: nn.Module,
        joined: frozenset[str],
    ) -> None:
        self._model = model
        self._places = places
        assert isinstance(places.main.directory, SharedDirectory)
        self._directory = places.main.directory
        self._like = like
        self._joined = joined
        # of the user's, in which the ranks are
        self._call = ""

    def newest(self) -> Chosen | None:
        """The newest checkpoint that verifies on every rank; None in an empty directory.

        Raises:
            CheckpointError: there are checkpoints and none verifies, or one cannot be read now.
        """
        self._call = "resume()"
        found = self._found()
        skipped = [*found.skipped]
        if not found.found and not skipped:
            if found.unreached:
                raise nothing_but(self._directory.path, found.unreached[0])
            return None
        for skip in skipped:
            logger.warning("actckpt: skipping %s: %s", skip.name, skip.reason)
        for lying in found.found:
            try:
                chosen = self._read(lying)
                return replace(chosen, skipped=tuple(skipped), unreached=found.unreached)
            except CheckpointFormatError as error:
                logger.warning("actckpt: skipping %s: %s", lying.name, error)
                skipped.append(Skipped(lying.name, str(error)))
        raise none_of(self._directory.path, skipped)

    def of_step(self, step: int | None) -> Chosen:
        """The newest checkpoint of a step, verified on every rank; None is the newest of all.

        Raises:
            CheckpointFormatError: that checkpoint is damaged.
            CheckpointError: there is no such checkpoint.
        """
        self._call = "restore()" if step is None else f"restore({step})"
        return self._read(newest_of(self._found().found, step, self._directory.path))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What the block raises, every rank raises; without an error, all are through.

        Raises:
            CheckpointMismatchError: on another rank the checkpoint does not fit.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as found:  # the others wait for a word of this rank, whatever it is
            error = found
        said = self._gather("" if error is None else _reason(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text:
                raise CheckpointMismatchError(f"rank {rank}: {text}")

    def elsewhere(self, names: frozenset[str]) -> frozenset[str]:
        """What other ranks have and this one has not, as those of a pipeline; every rank asks."""
        digest = digest_of_tree(sorted(names))
        if len(set(self._gather(digest))) == 1:
            return frozenset()
        said = self._gather(sorted(names))
        return frozenset(name for found in said for name in found) - names

    def _gather(self, message: Any) -> list[Any]:
        return self._directory.exchange.calls.gather(self._call, message)

    def _found(self) -> _Found:
        """What there is, on every rank the same: by the coordinator's word, and what nodes have."""
        self._places.meet()
        directory = self._directory

        def look() -> Any:
            found = directory.find()
            durable = [[c.path.name, c.step, c.manifest.serial, ""] for c in found.checkpoints]
            bad, unreached = [[s.name, s.reason] for s in found.skipped], []
            for uploads in self._places.stores:
                try:
                    stored, skipped = uploads.look()
                except CheckpointError as error:
                    logger.warning("actckpt: %s", error)
                    unreached.append(str(error))
                    continue
                url = uploads.store.url
                durable += [[s.name, s.manifest.step, s.manifest.serial, url] for s in stored]
                bad += [[s.name, s.reason] for s in skipped]
            return [durable, bad, unreached]

        there, bad, unreached = directory.decided(self._call, look)
        if not directory.exchange.is_coordinator:
            directory.find()
        found = [
            _Lying(
                f"{url}/{name}" if url else name,
                step,
                serial,
                partial(self._durable, name, url),
                directory.damaged,
            )
            for name, step, serial, url in there
        ]
        skipped = [Skipped(*s) for s in bad]
        for place in self._places.beside:
            assert isinstance(place.directory, NodeDirectory)
            of_nodes, lost = place.directory.candidates(self._needed)
            beside = place.directory.damaged
            found += [_Lying(c.name, c.step, c.serial, partial(_path, c), beside) for c in of_nodes]
            skipped += lost
        # of equal ones that of the durable directory: the sort is stable
        found.sort(key=lambda c: c.serial, reverse=True)
        # whatever this run goes on from, what it saves is newer than all that was seen
        directory.serial = max([directory.serial, *(c.serial for c in found)])
        return _Found(tuple(found), tuple(skipped), tuple(unreached))

    def _durable(self, name: str, url: str) -> Path:
        """One of the durable directory, or of a store, which the coordinator brings there."""
        directory = self._directory
        if url:
            name, damaged = directory.decided(self._call, partial(self._fetched, url, name))
            if damaged:
                raise CheckpointFormatError(damaged)
            directory.find()
        return directory.at(name)

    def _fetched(self, url: str, name: str) -> list[str]:
        try:
            return [self._places.fetch(url, name).path.name, ""]
        except CheckpointFormatError as error:
            return ["", str(error)]

    def _read(self, lying: _Lying) -> Chosen:
        """The checkpoint and this rank's share.

        Raises:
            CheckpointFormatError: that of a rank is damaged.
            CheckpointError: a rank could not read its share, which need not be damaged.
        """
        directory = self._directory
        path = lying.get()
        found: Chosen | None = None
        error: Exception | None = None
        shared = path.parent == Path(directory.path)
        once = self._once(str(path)) if shared else None
        save = ""
        try:
            with nullcontext() if once is None else once.together():
                if shared:
                    self._check_there(path)
                manifest = read_manifest(directory.files, str(path))
                # one on its own has none
                save = manifest.save or f"{manifest.serial} {manifest.saved_at_s}"
                if once is not None:
                    once.of = save
                share = self._share(str(path), manifest, once)
                found = Chosen(Checkpoint(path, manifest), share.items, inexact=share.inexact)
        except RanksApartError:
            raise  # the others have heard of it
        except Exception as raised:  # the others wait for a word of this rank, whatever it is
            error = raised
        # of what another rank could not read, that one says why
        unread = isinstance(error, UnreadError)
        damaged = unread or isinstance(error, CheckpointFormatError)
        reason = "" if error is None or unread else _reason(error)
        said = self._gather([damaged, reason, save])
        if once is not None:
            once.forget()
        if error is not None and not damaged:
            raise error
        for rank, (format_error, text, _) in enumerate(said):
            if text and not format_error:
                raise CheckpointError(f"{path} cannot be read now, by rank {rank}: {text}")
        other = different([save for _, _, save in said])
        if other:
            raise CheckpointError(f"{path} cannot be read now: {other}")
        reasons = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(said) if text]
        if unread and not reasons:
            raise CheckpointError(f"{path} cannot be read now: {error}")
        if reasons:
            lying.damaged.add(path.name)
            more = f" (and {len(reasons) - 1} more ranks)" if len(reasons) > 1 else ""
            raise CheckpointFormatError(reasons[0] + more)
        assert found is not None
        return found

    def _check_there(self, path: Path) -> None:
        """Raises unless this rank sees what the coordinator has found.

        Raises:
            CheckpointError: it does not, which is no fault of the checkpoint.
        """
        directory = self._directory
        if not directory.exchange.is_coordinator and directory.files.status(str(path)) is None:
            raise CheckpointError(f"{path} is not there, and rank 0 has found {path.name}: {SAME}")

    def _needed(self, path: str) -> set[str]:
        """The files of tensors that this rank reads of a checkpoint."""
        files, exchange = self._directory.files, self._directory.exchange
        manifest = read_manifest(files, path)
        return ShareReading(
            files,
            path,
            manifest,
            rank=exchange.rank,
            like=self._like(),
            joined=self._joined,
            same_world=manifest.world_size == exchange.world_size,
        ).needed_files()

    def _once(self, path: str) -> ReadingOnce | None:
        """How ranks read it together; None, and it is said, where they cannot."""
        files, exchange = self._directory.files, self._directory.exchange
        if exchange.world_size == 1:
            return None
        if not can_pass():
            logger.info(
                "actckpt: every rank reads for itself all that it needs of %s: the process group "
                "carries nothing that lies in the memory of the host; make it with the backend "
                '"cpu:gloo,cuda:nccl" to have it read once',
                path,
            )
            return None
        return ReadingOnce(files, path, exchange, exchange.calls.place(self._call), self._call)

    def _share(self, path: str, manifest: Manifest, once: ReadingOnce | None) -> Share:
        files, exchange = self._directory.files, self._directory.exchange
        if not manifest.world_size:
            files = files if once is None else FilesOnce(files, once, manifest.files)
            items = renamed(by_names(read_state(files, path)[1]), self._model)
            return Share(cut(items, self._like()))
        return read_share(
            files,
            path,
            manifest,
            rank=exchange.rank,
            world_size=exchange.world_size,
            like=self._like(),
            joined=self._joined,
            once=once,
        )


def _path(candidate: Candidate) -> Path:
    return candidate.get().path


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
