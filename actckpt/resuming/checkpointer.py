"""The public object: one run, its directory of checkpoints, and the loop that makes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from actckpt.checkpoint.commit import Snapshot, commit
from actckpt.checkpoint.discovery import Checkpoint, Found, Skipped, discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.lock import DirectoryLock
from actckpt.checkpoint.names import PINNED
from actckpt.checkpoint.retention import Keep, clean, ranked, retire
from actckpt.checkpoint.verification import LEVELS, read_state
from actckpt.errors import CheckpointError, CheckpointFormatError, CheckpointSaveError
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.data_position import DataPosition, Loader
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.random_states import put_random_states
from actckpt.resuming.resumed import Resumed
from actckpt.resuming.run_state import RunState

logger = logging.getLogger("actckpt")


class Checkpointer:
    """A training run that can be killed at any instant and resumed bit for bit.

    Args:
        directory: of this run alone; made if it does not exist.
        model, optimizer, scheduler, scaler, ema: what is saved and put back. Each may be anything
            with ``state_dict`` and ``load_state_dict``; the model is a module.
        loader: whose position is saved, by `steps`.
        extra: further such objects, by name.
        config: plain data that is saved, and compared when the run is resumed.
        every: a number of steps, a duration such as "10min", or None: only `save` saves.
        keep_last: how many of the newest checkpoints stay; None keeps all.
        keep_best: (metric, "min" or "max", how many) that stay besides.
        keep_every: checkpoints whose step is a multiple of this stay besides.
        verify: what is read back before a save counts: "full" is every byte, "manifest" the
            manifest and the files' sizes.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: nn.Module,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        ema: Stateful | None = None,
        loader: Loader | None = None,
        extra: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
        every: int | str | None = None,
        keep_last: int | None = 3,
        keep_best: tuple[str, str, int] | None = None,
        keep_every: int | None = None,
        verify: str = "full",
        files: Files | None = None,
    ) -> None:
        if verify not in LEVELS:
            raise ValueError(f"verify must be one of {', '.join(LEVELS)}; found {verify!r}")
        # the process may change its working directory
        self.directory = Path(directory).absolute()
        self.loader = loader
        self._files = Files() if files is None else files
        self._verify = verify
        self._keep = Keep(keep_last, keep_best, keep_every)
        self._cadence = Cadence(every)
        self._position = DataPosition()
        self._state = RunState(
            model,
            {
                "optimizer": optimizer,
                "scheduler": scheduler,
                "scaler": scaler,
                "ema": ema,
                **{f"extra-{name}": item for name, item in (extra or {}).items()},
            },
            config,
        )
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._latest: Checkpoint | None = None
        # the largest seen: one that cannot be read for a moment must not be taken for older
        self._serial = 0
        self._lock: DirectoryLock | None = None
        # put once nothing of the library draws any more
        self._random: dict[str, Any] | None = None
        # whether a batch was handed out since the last optimizer step
        self._accumulating = False

    # ---- the loop

    @property
    def step_count(self) -> int:
        """Optimizer steps made, including those before a resume."""
        return self._step

    @property
    def epoch(self) -> int:
        """Epochs of the loader that were read to their end."""
        return self._position.epoch

    def steps(
        self,
        loader: Loader | None = None,
        *,
        epochs: int | None = 1,
        total_steps: int | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """(steps made so far, batch) of what is left of the run, from the exact position.

        Args:
            loader: by default that of the constructor.
            epochs: of the whole run, including those before a resume; None is without end.
            total_steps: ends once `step` was called so often in the whole run.

        Raises:
            CheckpointMismatchError: the loader cannot be brought to the saved position.
        """
        if loader is not None:
            self._position.check(None, loader, str(self.directory))
            self.loader = loader
        if self.loader is None:
            raise TypeError("steps() needs a loader, here or in the constructor")
        while epochs is None or self._position.epoch < epochs:
            for batch in self._position.rest_of_epoch(self.loader, self._put_random):
                if total_steps is not None and self._step >= total_steps:
                    return
                self._accumulating, self._latest = True, None
                yield self._step, batch

    def step(self, metrics: Mapping[str, Any] | None = None) -> Checkpoint | None:
        """Counts an optimizer step, and saves if a checkpoint is due; returns the checkpoint then.

        Args:
            metrics: numbers, or tensors of one, that belong to the state after this step.

        Raises:
            CheckpointSaveError: a checkpoint was due and could not be made.
        """
        self._step += 1
        self._latest, self._random, self._accumulating = None, None, False
        self._metrics = _numbers(metrics)
        return self.save() if self._cadence.due(self._step) else None

    # ---- saving

    def save(self, *, tag: str = "", metrics: Mapping[str, Any] | None = None) -> Checkpoint:
        """A durable, verified checkpoint of the state as it is now.

        Where this very state was saved already, that checkpoint.

        Raises:
            CheckpointSaveError: none was made, and the earlier ones are as before.
            CheckpointError: somebody else writes into this directory.
        """
        added = _numbers(metrics)
        if self._latest is not None and self._latest.tag == tag and not added:
            return self._latest
        self._metrics |= added
        self._acquire()
        found = self.find()
        snapshot = self._snapshot(tag)
        made = commit(
            self._files,
            str(self.directory),
            snapshot,
            serial=self._serial + 1,
            verify=self._verify,
        )
        self._serial += 1
        self._latest = made
        self._retire((made, *found.checkpoints))
        self._cadence.saved()
        return made

    def _snapshot(self, tag: str) -> Snapshot:
        progress = {"step": self._step, "metrics": self._metrics}
        items = self._state.gather(
            progress=progress,
            position=self._position.state_dict(self.loader),
            random=self._random,
            accumulating=self._accumulating,
        )
        return Snapshot(
            step=self._step,
            items=items,
            tag=tag,
            metrics=dict(self._metrics),
            fingerprint=self._state.fingerprint(),
            versions=self._state.versions(),
        )

    def _retire(self, checkpoints: tuple[Checkpoint, ...]) -> None:
        """Deletes what nothing keeps; the first is new and verified, so failing is no loss."""
        kept = {c.path for c in self._keep(checkpoints)}
        try:
            retire(self._files, str(self.directory), [c for c in checkpoints if c.path not in kept])
        except OSError as error:
            logger.warning("actckpt: an old checkpoint could not be deleted: %s", error)

    def _acquire(self) -> None:
        """Makes the directory, and the right to write there, this run's.

        Raises:
            CheckpointError: somebody else has it.
            CheckpointSaveError: it cannot be made or written.
        """
        if self._lock is not None and self._lock.held:
            return
        directory = str(self.directory)
        try:
            self._files.make_directories(directory)
            self._lock = DirectoryLock(self._files, directory)
        except OSError as error:
            raise CheckpointSaveError(
                f"{directory} cannot be written: {error}. Choose another directory, or remove the "
                "cause"
            ) from error
        try:
            clean(self._files, directory)
        except OSError as error:
            logger.warning("actckpt: leftovers in %s could not be deleted: %s", directory, error)

    # ---- finding

    def list(self) -> list[Checkpoint]:
        """The checkpoints in the directory, newest first, without those of damaged manifests."""
        return list(self.find().checkpoints)

    def find(self) -> Found:
        """The checkpoints newest first, and what is named as one and cannot be used."""
        found = discover(self._files, str(self.directory))
        self._serial = max([self._serial, *(c.manifest.serial for c in found.checkpoints)])
        return found

    def best(self, metric: str | None = None, mode: str = "min") -> Checkpoint | None:
        """The best checkpoint, the newer of equal ones; None if none has the metric.

        Args:
            metric, mode: by default those of ``keep_best``.

        Raises:
            ValueError: there is no metric to go by.
        """
        if metric is None:
            if self._keep.best is None:
                raise ValueError("best() needs a metric, here or in keep_best")
            metric, mode, _ = self._keep.best
        return next(iter(ranked(self.list(), metric, mode)), None)

    def pin(self, step: int, pinned: bool = True) -> None:
        """Keeps the newest checkpoint of a step whatever the retention says, or no longer.

        Raises:
            CheckpointError: there is no checkpoint of that step, or somebody else writes here.
        """
        name = self._of_step(step).path.name
        self._acquire()
        marker = f"{self.directory}/{PINNED}{name}"
        try:
            if pinned and self._files.status(marker) is None:
                with self._files.writing(marker):
                    pass
            elif not pinned:
                self._files.remove_tree(marker)
            self._files.sync_directory(str(self.directory))
        except OSError as error:
            raise CheckpointSaveError(f"step {step} could not be pinned: {error}") from error

    def _of_step(self, step: int) -> Checkpoint:
        found = self.list()
        for checkpoint in found:
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(c.step) for c in found) or "none"
        raise CheckpointError(
            f"{self.directory} has no usable checkpoint of step {step}; there are: {steps}"
        )

    # ---- coming back

    def resume(self) -> Resumed | None:
        """The run put back to its newest checkpoint that verifies, and what was found on the way.

        None in an empty directory, and nothing is changed then.

        Raises:
            CheckpointError: there are checkpoints and none verifies, or somebody else writes here.
            CheckpointMismatchError: the checkpoint is of other objects; they are as before.
        """
        self._acquire()
        found = self.find()
        if not found.checkpoints and not found.skipped:
            return None
        skipped: list[Skipped] = list(found.skipped)
        for checkpoint in found.checkpoints:
            try:
                _, items = read_state(self._files, str(checkpoint.path))
            except CheckpointFormatError as error:
                logger.warning("actckpt: skipping %s: %s", checkpoint.path.name, error)
                skipped.append(Skipped(checkpoint.path.name, str(error)))
                continue
            return self._put(checkpoint, items, tuple(skipped))
        reasons = "\n".join(f"  {s.name}: {s.reason}" for s in skipped[:5])
        raise CheckpointError(
            f"{self.directory} has {len(skipped)} checkpoints and none can be used:\n{reasons}\n"
            "Restore one from a copy, or start in another directory; nothing was changed"
        )

    def restore(self, step: int | None = None, *, only: Iterable[str] | None = None) -> Resumed:
        """The run put back to the newest checkpoint of a step, or the newest of all.

        What is saved from then on is newer than every existing checkpoint, whatever its step.

        Args:
            only: items to put back, such as ``["model"]``; the run's position and random states
                are then left as they are. None puts everything back.

        Raises:
            CheckpointFormatError: that checkpoint is damaged.
            CheckpointError: there is no such checkpoint.
            CheckpointMismatchError: it is of other objects; they are as before.
        """
        if step is None:
            checkpoints = self.list()
            if not checkpoints:
                raise CheckpointError(f"{self.directory} has no usable checkpoint")
            checkpoint = checkpoints[0]
        else:
            checkpoint = self._of_step(step)
        _, items = read_state(self._files, str(checkpoint.path))
        return self._put(checkpoint, items, (), None if only is None else frozenset(only))

    def _put(
        self,
        checkpoint: Checkpoint,
        items: dict[str, Any],
        skipped: tuple[Skipped, ...],
        only: frozenset[str] | None = None,
    ) -> Resumed:
        where = str(checkpoint.path)
        if only is None:
            self._position.check(items["position"], self.loader, where)
        put = self._state.put(items, where, checkpoint.manifest.versions, only)
        if only is None:
            self._position.load_state_dict(items["position"])
            self._step = items["progress"]["step"]
            self._metrics = dict(items["progress"]["metrics"])
            self._random = items["random"]
            self._latest = checkpoint
            self._accumulating = bool(items["gradients"])
            self._cadence.saved()
            put_random_states(self._random)
        return Resumed(
            checkpoint=checkpoint,
            epoch=items["position"]["epoch"],
            batch=items["position"]["batch"],
            skipped=skipped,
            inexact=put.inexact,
            plan=put.plan,
            notes=put.notes,
        )

    def _put_random(self) -> None:
        """Puts back the random states of a checkpoint, the first time that it is asked."""
        states, self._random = self._random, None
        if states is not None:
            put_random_states(states)

    # ---- the end

    def close(self) -> None:
        """Lets others write into the directory; saves nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    found = {}
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"metric {name} must be a number, or a tensor of one; found {value!r:.80}"
            ) from error
    return found
