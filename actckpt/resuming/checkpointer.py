"""The public object: one run, its directory of checkpoints, and the loop that makes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from actckpt.checkpoint.commit import Snapshot
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep, ranked
from actckpt.checkpoint.verification import LEVELS
from actckpt.resuming import choosing
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.choosing import Chosen
from actckpt.resuming.data_position import Loader
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.progress import Progress, numbers
from actckpt.resuming.resumed import Resumed
from actckpt.resuming.run_state import RunState


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
        self._directory = RunDirectory(
            str(self.directory),
            Files() if files is None else files,
            Keep(keep_last, keep_best, keep_every),
            verify,
        )
        self._cadence = Cadence(every)
        self._progress = Progress(loader)
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
        # of the state as it is now
        self._latest: Checkpoint | None = None

    # ---- the loop

    @property
    def step_count(self) -> int:
        """Optimizer steps made, including those before a resume."""
        return self._progress.step

    @property
    def epoch(self) -> int:
        """Epochs of the loader that were read to their end."""
        return self._progress.position.epoch

    @property
    def loader(self) -> Loader | None:
        """The loader whose position is saved."""
        return self._progress.loader

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
        progress, position = self._progress, self._progress.position
        if loader is not None:
            position.check(None, loader, str(self.directory))
            progress.loader = loader
        if progress.loader is None:
            raise TypeError("steps() needs a loader, here or in the constructor")
        while epochs is None or position.epoch < epochs:
            for batch in position.rest_of_epoch(progress.loader, progress.put_random):
                if total_steps is not None and progress.step >= total_steps:
                    return
                progress.accumulating, self._latest = True, None
                yield progress.step, batch

    def step(self, metrics: Mapping[str, Any] | None = None) -> Checkpoint | None:
        """Counts an optimizer step, and saves if a checkpoint is due; returns the checkpoint then.

        Args:
            metrics: numbers, or tensors of one, that belong to the state after this step.

        Raises:
            CheckpointSaveError: a checkpoint was due and could not be made.
        """
        self._progress.stepped(metrics)
        self._latest = None
        return self.save() if self._cadence.due(self._progress.step) else None

    # ---- saving

    def save(self, *, tag: str = "", metrics: Mapping[str, Any] | None = None) -> Checkpoint:
        """A durable, verified checkpoint of the state as it is now.

        Where this very state was saved already, that checkpoint.

        Raises:
            CheckpointSaveError: none was made, and the earlier ones are as before.
            CheckpointError: somebody else writes into this directory.
        """
        added = numbers(metrics)
        if self._latest is not None and self._latest.tag == tag and not added:
            return self._latest
        self._progress.metrics |= added
        self._directory.acquire()
        self._latest = made = self._directory.write(self._snapshot(tag))
        self._cadence.saved()
        return made

    def _snapshot(self, tag: str) -> Snapshot:
        progress = self._progress
        return Snapshot(
            step=progress.step,
            items=self._state.gather(progress.items(), accumulating=progress.accumulating),
            tag=tag,
            metrics=dict(progress.metrics),
            fingerprint=self._state.fingerprint(),
            versions=self._state.versions(),
        )

    # ---- finding

    def list(self) -> list[Checkpoint]:
        """The checkpoints in the directory, newest first, without those of damaged manifests."""
        return list(self._directory.find().checkpoints)

    def best(self, metric: str | None = None, mode: str = "min") -> Checkpoint | None:
        """The best checkpoint, the newer of equal ones; None if none has the metric.

        Args:
            metric, mode: by default those of ``keep_best``.

        Raises:
            ValueError: there is no metric to go by.
        """
        if metric is None:
            if self._directory.keep.best is None:
                raise ValueError("best() needs a metric, here or in keep_best")
            metric, mode, _ = self._directory.keep.best
        return next(iter(ranked(self.list(), metric, mode)), None)

    def pin(self, step: int, pinned: bool = True) -> None:
        """Keeps the newest checkpoint of a step whatever the retention says, or no longer.

        Raises:
            CheckpointError: there is no checkpoint of that step, or somebody else writes here.
        """
        self._directory.pin(step, pinned)

    # ---- coming back

    def resume(self) -> Resumed | None:
        """The run put back to its newest checkpoint that verifies, and what was found on the way.

        None in an empty directory, and nothing is changed then.

        Raises:
            CheckpointError: there are checkpoints and none verifies, or somebody else writes here.
            CheckpointMismatchError: the checkpoint is of other objects; they are as before.
        """
        self._directory.acquire()
        chosen = choosing.newest(self._directory)
        return None if chosen is None else self._put(chosen)

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
        chosen = choosing.of_step(self._directory, step)
        return self._put(chosen, None if only is None else frozenset(only))

    def _put(self, chosen: Chosen, only: frozenset[str] | None = None) -> Resumed:
        checkpoint, items = chosen.checkpoint, chosen.items
        where = str(checkpoint.path)
        if only is None:
            self._progress.position.check(items["position"], self.loader, where)
        put = self._state.put(items, where, checkpoint.manifest.versions, only)
        if only is None:
            self._progress.put(items)
            self._latest = checkpoint
            self._cadence.saved()
        return Resumed(
            checkpoint=checkpoint,
            epoch=items["position"]["epoch"],
            batch=items["position"]["batch"],
            skipped=chosen.skipped,
            inexact=put.inexact,
            plan=put.plan,
            notes=put.notes,
        )

    # ---- the end

    def close(self) -> None:
        """Lets others write into the directory; saves nothing."""
        self._directory.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
