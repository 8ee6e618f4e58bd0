"""The public object: one run, its directory of checkpoints, and the loop that makes them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Literal, Self, overload

from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep, ranked
from actckpt.checkpoint.verification import LEVELS
from actckpt.errors import CheckpointError
from actckpt.resuming import choosing
from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.choosing import Chosen
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.journal import ON_DIFFERENCE, Journal
from actckpt.resuming.journal_compare import Verified
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import Loader
from actckpt.resuming.optimizer_items import optimizer_items
from actckpt.resuming.progress import Progress
from actckpt.resuming.resumed import Resumed
from actckpt.resuming.run_state import RunState
from actckpt.resuming.saves import Saves
from actckpt.resuming.saving import Saver
from actckpt.resuming.termination import Termination


class Checkpointer:
    """A training run that can be killed at any instant and resumed bit for bit.

    Args:
        directory: of this run alone; made if it does not exist.
        model, optimizer, scheduler, scaler, ema: what is saved and put back. Each may be anything
            with ``state_dict`` and ``load_state_dict``; the model is a module. Several optimizers
            are a list, always in the same order.
        loader: whose position is saved, by `steps`.
        extra: further such objects, by name.
        config: plain data that is saved, and compared when the run is resumed.
        every: "auto": the interval that loses the least time (see `Cadence`), by what a save is
            measured to cost and by ``mtbf``, the first step of a process saving to measure it; or a
            number of steps, or a duration such as "10min", or None: only `save` saves.
        mtbf: mean time between failures, a duration.
        keep_last: how many of the newest checkpoints stay; None keeps all.
        keep_best: (metric, "min" or "max", how many) that stay besides. A NaN is never best; where
            no checkpoint has the metric, a warning says so once before one is deleted.
        keep_every: checkpoints whose step is a multiple of this stay besides.
        background: saves that are due stop training only while the state is copied in memory; a
            thread writes. What one failed with is raised once, by the next `step`, `save` or
            `close`, with what others failed with as notes. False writes at once, and copies
            nothing.
        staging_sets: copies of the state that may exist; with 2, one more save can begin while one
            is being written. A save that finds none free waits.
        staging_gb: bound of their memory, 10^9 bytes; None is no bound.
        verify: what is read back before a save counts: "full" is every byte, "manifest" the
            manifest and the files' sizes.
        fresh: begins anew in a directory that holds another run's checkpoints: they are moved into
            a dated folder beside them as soon as this run resumes (nothing), trains or saves.
            Without it, `steps`, `step` and `save` refuse such a directory until the run has gone
            on from one of them.
        on_sigterm: "save" saves after the step in which SIGTERM comes and then ends the process
            with status 143, or passes the signal on to the handler that was there before; from the
            first step to `close`. None leaves the signal alone.
        on_difference: of steps that a resumed run makes again, because it was killed after them
            (see `verified`): "warn" logs the first difference, "raise" raises it. None keeps no
            journal, so that nothing is compared.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: nn.Module,
        optimizer: Stateful | Iterable[Stateful] | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        ema: Stateful | None = None,
        loader: Loader | None = None,
        extra: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
        every: int | str | None = "auto",
        mtbf: str = "24h",
        keep_last: int | None = 3,
        keep_best: tuple[str, str, int] | None = None,
        keep_every: int | None = None,
        background: bool = True,
        staging_sets: int = 1,
        staging_gb: float | None = None,
        verify: str = "full",
        fresh: bool = False,
        on_sigterm: str | None = "save",
        on_difference: str | None = "warn",
        files: Files | None = None,
    ) -> None:
        if verify not in LEVELS:
            raise ValueError(f"verify must be one of {', '.join(LEVELS)}; found {verify!r}")
        if on_sigterm not in ("save", None):
            raise ValueError(f'on_sigterm must be "save" or None; found {on_sigterm!r}')
        if on_difference not in ON_DIFFERENCE:
            raise ValueError(
                f'on_difference must be "warn", "raise" or None; found {on_difference!r}'
            )
        if type(staging_sets) is not int or staging_sets < 1:
            raise ValueError(f"staging_sets must be at least 1; found {staging_sets!r}")
        if staging_gb is not None and not staging_gb > 0:
            raise ValueError(f"staging_gb must be above 0, or None; found {staging_gb!r}")
        # the process may change its working directory
        self.directory = Path(directory).absolute()
        self._directory = RunDirectory(
            str(self.directory),
            Files() if files is None else files,
            Keep(keep_last, keep_best, keep_every),
            verify,
            fresh=fresh,
        )
        limit_bytes = None if staging_gb is None else int(staging_gb * 1e9)
        self._fresh = fresh
        self._saver = Saver(self._directory, staging_sets, limit_bytes)
        self._background = background
        self._termination = Termination(self) if on_sigterm == "save" else None
        self._state = RunState(
            model,
            {
                **optimizer_items(optimizer),
                "scheduler": scheduler,
                "scaler": scaler,
                "ema": ema,
                **{f"extra-{name}": item for name, item in (extra or {}).items()},
            },
            config,
        )
        self._progress = Progress(loader, self._state.objects)
        objects = self._state.objects
        self._journal = Journal(self._directory, self._state.modules, objects, on_difference)
        self._saves = Saves(
            self._saver, self._state, self._progress, Cadence(every, mtbf), background
        )
        self._progress.tell(
            weakref.WeakMethod(self._handed_out), weakref.WeakMethod(self._saves.asked_on)
        )
        self._steps_begun = False

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
        epochs: int | EllipsisType | None = ...,
        total_steps: int | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """(steps made so far, batch) of what is left of the run, from the exact position.

        A sampler that orders by epoch (DistributedSampler) is told the epoch, unless you tell it.

        Args:
            loader: by default that of the constructor.
            epochs: of the whole run, including those before a resume; None is without end. By
                default 1, or without end where ``total_steps`` is given.
            total_steps: ends once `step` was called so often in the whole run.

        Raises:
            ValueError: there were `steps` before, and neither says up to where these go.
            CheckpointMismatchError: the loader cannot be brought to the saved position.
            CheckpointError: the directory holds checkpoints that the run did not go on from.
        """
        self._directory.take_up()
        progress, position = self._progress, self._progress.position
        if epochs is ...:
            if total_steps is None and self._steps_begun and not position.is_pending:
                raise ValueError(
                    "steps() was called before, and reads one epoch of the whole run: a second "
                    "call would read nothing. Write one loop, `for step, batch in "
                    "run.steps(loader, epochs=3)`, or run.steps(loader, total_steps=1000); "
                    "run.epoch says which epoch it is in"
                )
            epochs = 1 if total_steps is None else None
        self._steps_begun = True
        if loader is not None:
            position.check(None, loader, str(self.directory))
            progress.read_from(loader)
        if progress.loader is None:
            raise TypeError("steps() needs a loader, here or in the constructor")
        self._watch()

        def left() -> bool:
            return total_steps is None or progress.step < total_steps

        while left() and (epochs is None or position.epoch < epochs):
            for batch in position.rest_of_epoch(progress.loader):
                self._handed_out(progress.batches, batch)
                yield progress.step, batch
                self._saves.asked_on()
                self._end_if_asked()
                if not left():
                    return  # before a batch is read that nobody trains on

    def _handed_out(self, batches: BatchChain, batch: object) -> None:
        """A batch was, which belongs to the next step with those before it."""
        self._progress.accumulating = True
        self._journal.read(batches, self._progress.step + 1, batch)
        self._saves.handed_out()

    def before_optimizer_step(self) -> None:
        """Keeps the optimizer's next step from changing what a save still has to copy.

        Does nothing on the CPU, where `step` returns after the copy. On CUDA no processor waits:
        the device does. A `torch.optim.Optimizer` does it on its own; call it before the step of
        any other.
        """
        self._saver.guard()

    def step(self, metrics: Mapping[str, Any] | None = None) -> bool:
        """Counts an optimizer step; returns whether a checkpoint was due, and so made or begun.

        Args:
            metrics: numbers, or tensors of one, that belong to the state after this step.

        Raises:
            CheckpointSaveError: a checkpoint could not be made, now or in the background before.
                The step was counted.
            CheckpointError: the directory holds checkpoints that the run did not go on from.
            CheckpointDifferenceError: as ``on_difference`` asks. The step was counted.
            SystemExit: SIGTERM came, and the state is saved.
        """
        self._directory.take_up()
        self._watch()
        batches = self._progress.stepped(metrics)
        self._saves.counted()
        self._journal.stepped(self.step_count, batches.seen, self._progress.metrics)
        due = self._saves.due()
        if due and self._background:
            self.save(wait=False)
        elif due:
            self.save()
        self._saves.raise_failures()
        self._end_if_asked()
        return due

    def stop_early(self, patience: int, metric: str | None = None, mode: str = "min") -> bool:
        """Whether so many reports of a metric came without one better than all before.

        Counted over the whole run, resumed or not. A NaN counts as a report that is no better.

        Args:
            patience: reports, at least 1: as many `step` or `save` calls with the metric.
            metric, mode: by default those of ``keep_best``.

        Raises:
            ValueError: there is no metric to go by.
        """
        if type(patience) is not int or patience < 1:
            raise ValueError(f"patience must be at least 1; found {patience!r}")
        return self._progress.history.since_best(*self._goal(metric, mode)) >= patience

    # ---- saving

    @overload
    def save(
        self,
        *,
        tag: str = "",
        metrics: Mapping[str, Any] | None = None,
        wait: Literal[True] = True,
    ) -> Checkpoint: ...

    @overload
    def save(
        self, *, tag: str = "", metrics: Mapping[str, Any] | None = None, wait: Literal[False]
    ) -> None: ...

    def save(
        self, *, tag: str = "", metrics: Mapping[str, Any] | None = None, wait: bool = True
    ) -> Checkpoint | None:
        """A durable, verified checkpoint of the state as it is now.

        Where this very state was saved already, that checkpoint. Gradients are part of it while
        `steps` has handed out a batch since the last `step`; a loop of your own saves between two
        optimizer steps.

        Args:
            metrics: more of them that belong to this state.
            wait: False returns None as soon as the state is copied; a thread writes.

        Raises:
            CheckpointSaveError: none was made, and the earlier ones are as before; or one before
                was not made in the background.
            CheckpointError: somebody else writes into this directory, or it holds checkpoints that
                the run did not go on from.
        """
        if not isinstance(tag, str):
            raise TypeError(f"tag must be a text; found {tag!r:.60}")
        self._directory.take_up()
        self._journal.saved()
        if wait:
            return self._saves.make(tag, metrics)
        self._saves.begin(tag, metrics)
        return None

    @property
    def staging_bytes(self) -> int:
        """Memory that copies of the state take, from the first save in the background on."""
        return self._saver.staging_bytes

    def _watch(self) -> None:
        self._saves.under_way.watch()
        if self._termination is not None:
            self._termination.watch()

    def _end_if_asked(self) -> None:
        if self._termination is not None and self._termination.asked:
            self.save()
            self._termination.end()

    # ---- finding

    def list(self) -> list[Checkpoint]:
        """The checkpoints in the directory, newest first, without those of damaged manifests.

        Waits for a save in the background, as everything does that reads the directory.
        """
        self._saver.wait()
        return list(self._directory.find().checkpoints)

    def best(self, metric: str | None = None, mode: str = "min") -> Checkpoint | None:
        """The best checkpoint, the newer of equal ones; None if none has the metric.

        Args:
            metric, mode: by default those of ``keep_best``.

        Raises:
            ValueError: there is no metric to go by.
        """
        return next(iter(ranked(self.list(), *self._goal(metric, mode))), None)

    def _goal(self, metric: str | None, mode: str) -> tuple[str, str]:
        if mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max"; found {mode!r}')
        if metric is not None:
            return metric, mode
        if self._directory.keep.best is None:
            raise ValueError("there is no metric to go by: give one here or in keep_best")
        return self._directory.keep.best[:2]

    def pin(self, step: int, pinned: bool = True) -> None:
        """Keeps the newest checkpoint of a step whatever the retention says, or no longer.

        Raises:
            CheckpointError: there is no checkpoint of that step, or somebody else writes here.
        """
        self._saver.wait()
        self._directory.pin(step, pinned)

    # ---- coming back

    def resume(self) -> Resumed | None:
        """The run put back to its newest checkpoint that verifies, and what was found on the way.

        None in an empty directory, or with ``fresh``, and nothing is changed then. A directory that
        cannot be written is read, and a note says so; saving raises then.

        Raises:
            CheckpointError: there are checkpoints and none verifies, or somebody else writes here.
            CheckpointMismatchError: the checkpoint is of other objects; they are as before.
        """
        self._saver.wait()
        if self._fresh:
            self._directory.take_up()
        read_only = self._directory.acquire_unless_read_only()
        chosen = choosing.newest(self._directory)
        if chosen is not None:
            note = "" if read_only is None else str(read_only)
            return self._put(chosen, note=note, again=True)
        if read_only is not None:
            raise read_only
        self._directory.go_on()
        self._saves.under_way.watch()
        return None

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
        self._saver.wait()
        chosen = choosing.of_step(self._directory, step)
        return self._put(chosen, None if only is None else frozenset(only))

    def _put(
        self,
        chosen: Chosen,
        only: frozenset[str] | None = None,
        note: str = "",
        *,
        again: bool = False,
    ) -> Resumed:
        checkpoint, items = chosen.checkpoint, chosen.items
        where = str(checkpoint.path)
        if only is None:
            self._progress.check(items, where)
        put = self._state.put(items, where, checkpoint.manifest.versions, only)
        self._directory.go_on(whole=only is None)
        inexact = list(put.inexact)
        if only is None:
            inexact += self._progress.inexact(items)
            inexact += self._saves.under_way.put(items.get("under-way"))
            self._saves.under_way.watch()
            self._progress.put(items)
            self._saves.put_back(checkpoint)
        if again:
            unseen = self._journal.resumed(checkpoint)
        else:
            unseen = self._journal.restored(checkpoint if only is None else None)
        return Resumed(
            checkpoint=checkpoint,
            epoch=items["position"]["epoch"],
            batch=items["position"]["batch"],
            skipped=chosen.skipped,
            inexact=tuple(inexact),
            plan=put.plan,
            notes=(*put.notes, *filter(None, (unseen, note))),
        )

    @property
    def verified(self) -> Verified:
        """How many steps were made again since `resume`, and the first that came out otherwise.

        A run is nearly always killed some steps after its last checkpoint. What was seen of them is
        in a journal beside the checkpoints: digests of the batches, the random states and a sample
        of the weights, and the metrics. So `Resumed.bit_exact` is what is expected, and this is
        what was seen. After `restore` nothing is compared.
        """
        return self._journal.verified

    # ---- the end

    def close(self) -> None:
        """Ends saves in the background, then lets others write into the directory.

        Saves nothing itself, unless SIGTERM came after the last step. Ctrl-C while it waits leaves
        the save to end on its own; until it has, nobody else may write there.

        Raises:
            CheckpointSaveError: a save in the background has failed, and that was not raised yet.
            SystemExit: SIGTERM came after the last step, and the state is saved.
        """
        termination = self._termination
        asked = termination is not None and termination.asked
        try:
            if asked:
                self.save()
            self._saver.wait()
            self._journal.close()
        finally:
            if termination is not None:
                termination.unwatch()
            self._saves.under_way.unwatch()
            self._progress.unwatch()
            self._saver.at_rest(self._directory.release)
        self._saves.raise_failures()
        if termination is not None and asked:
            termination.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._termination is not None:
            self._termination.asked = False  # the loop's own error ends it
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"Besides, a checkpoint was not saved: {failure}")
            for note in getattr(failure, "__notes__", ()):
                error.add_note(note)
