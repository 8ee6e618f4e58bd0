"""The public object: one run, its directory of checkpoints, and the loop that makes them."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import EllipsisType, TracebackType
from typing import Any, Literal, Self, overload

from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import local_path, refuse_file
from actckpt.checkpoint.retention import Keep
from actckpt.checkpoint.snapshot import size_bytes
from actckpt.checkpoint.verification import LEVELS
from actckpt.errors import ArgumentError, CheckpointError
from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.cadence import Every
from actckpt.resuming.company import company_of
from actckpt.resuming.journal import ON_DIFFERENCE, Journal
from actckpt.resuming.last_save import SaveOutcome
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import Loader
from actckpt.resuming.metrics import numbers
from actckpt.resuming.optimizer_items import optimizer_items
from actckpt.resuming.places import Place, Places
from actckpt.resuming.progress import Progress
from actckpt.resuming.resumable import Resumable
from actckpt.resuming.run_state import RunState
from actckpt.resuming.saves import Saves
from actckpt.resuming.saving import Saver
from actckpt.resuming.termination import Termination
from actckpt.resuming.tier import Tier, as_tiers


class Checkpointer(Resumable):
    """A training run that can be killed at any instant and resumed bit for bit.

    Args:
        directory: of this run alone, on this machine; made if it does not exist.
        model: the module that is saved and put back.
        optimizer: anything with ``state_dict`` and ``load_state_dict``, or several as a list,
            always in the same order; saved and put back, like the next three.
        scheduler: anything with these two methods.
        scaler: anything with these two methods.
        ema: anything with these two methods.
        loader: whose position is saved, by `steps`.
        extra: further such objects, by name.
        config: a dict of plain data that is saved, and compared when the run is resumed.
        every: "auto": the interval that loses the least time (see `Cadence`), by what a save is
            measured to cost and by ``mtbf``, the first step of a process saving to measure it; or a
            number of steps, or a duration such as "10 minutes" or "1d", or None: only `save` saves.
        mtbf: mean time between failures, a duration.
        keep_last: how many of the newest checkpoints stay; None keeps all.
        keep_best: (metric, "min" or "max", how many) that stay besides. A NaN is never best; where
            no checkpoint has the metric, a warning says so once before one is deleted.
        keep_every: checkpoints whose step is a multiple of this stay besides.
        keep_hourly: of the last so many hours in which there is a checkpoint, the newest stays
            besides.
        keep_daily: the same of days, by UTC.
        only_better: (metric, "min" or "max"): a save that is due in the directory is made only
            after a step that reported the best value of this metric so far; of many ranks, what the
            first reported counts. `save` saves always.
        on_saved: called with each checkpoint that was made, in the thread that trains, by the next
            `step`, `save` or `close`; what it raises, they raise.
        tiers: places beside the directory that checkpoints go to, each a `Tier` or (path, every,
            keep): faster folders more often, object stores behind. `resume` takes the newest that
            verifies, wherever it lies; what fails there is a warning, but for the newest one's copy
            at `close`. Of many ranks each writes into the folder of its own machine.
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
        on_failed: of saves that nobody waits for: "raise" raises in the next `step`, `save` or
            `close` what one failed with; "warn" logs it, and the run goes on without that
            checkpoint. None is "raise" in a process on its own, and "warn" where many ranks train
            together: `last_save` has the same on each.
        rank_silence: where many ranks train together, a rank whose process has not been heard of
            for so long, a duration, is taken for dead: the save under way has failed then.
        rank_timeout: likewise, of one that is heard of and does not come.

    Raises:
        ArgumentError: an argument is none of these.
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
        every: Every = "auto",
        mtbf: str = "24h",
        keep_last: int | None = 3,
        keep_best: tuple[str, str, int] | None = None,
        keep_every: int | None = None,
        keep_hourly: int | None = None,
        keep_daily: int | None = None,
        only_better: tuple[str, str] | None = None,
        on_saved: Callable[[Checkpoint], object] | None = None,
        tiers: Iterable[Tier | tuple[str | os.PathLike[str], int | str, int]] = (),
        background: bool = True,
        staging_sets: int = 1,
        staging_gb: float | None = None,
        verify: str = "full",
        fresh: bool = False,
        on_sigterm: str | None = "save",
        on_difference: str | None = "warn",
        on_failed: str | None = None,
        rank_silence: str = "10s",
        rank_timeout: str = "30 minutes",
        files: Files | None = None,
    ) -> None:
        if verify not in LEVELS:
            raise ArgumentError(f"verify must be one of {', '.join(LEVELS)}; found {verify!r}")
        if on_sigterm not in ("save", None):
            raise ArgumentError(f'on_sigterm must be "save" or None; found {on_sigterm!r}')
        if on_difference not in ON_DIFFERENCE:
            raise ArgumentError(
                f'on_difference must be "warn", "raise" or None; found {on_difference!r}'
            )
        if on_failed not in ("raise", "warn", None):
            raise ArgumentError(f'on_failed must be "raise", "warn" or None; found {on_failed!r}')
        if type(staging_sets) is not int or staging_sets < 1:
            raise ArgumentError(f"staging_sets must be at least 1; found {staging_sets!r}")
        if staging_gb is not None and not staging_gb > 0:
            raise ArgumentError(f"staging_gb must be above 0, or None; found {staging_gb!r}")
        # the process may change its working directory
        self.directory = local_path(directory).absolute()
        refuse_file(self.directory)
        company = self._company = company_of(model, rank_silence, rank_timeout)
        durable = company.directory(
            str(self.directory),
            Files() if files is None else files,
            Keep(keep_last, keep_best, keep_every, keep_hourly, keep_daily),
            verify,
            fresh=fresh,
        )
        self._places = Places(
            durable,
            company.cadence(every, mtbf),
            as_tiers(tiers),
            verify,
            fresh=fresh,
            company=company,
        )
        limit_bytes = None if staging_gb is None else int(staging_gb * 1e9)
        self._fresh = fresh
        self._saver = Saver(self._places, staging_sets, limit_bytes)
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
            ranked=company.ranked,
        )
        self._choice = company.choice(self._places, self._state)
        self._progress = Progress(loader, self._state.objects)
        objects = self._state.objects
        self._journal = Journal(self._places, self._state.modules, objects, on_difference)
        raises = on_failed == "raise" if on_failed is not None else not company.ranked
        self._saves = Saves(
            self._saver,
            self._state,
            self._progress,
            self._places,
            background,
            raises=raises,
            skips=not company.ranked,
        )
        self._progress.tell(
            weakref.WeakMethod(self._handed_out), weakref.WeakMethod(self._saves.asked_on)
        )
        self._steps_begun = False
        self._only_better = None if only_better is None else _goal(only_better)
        self._on_saved = on_saved

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
            ArgumentError: there were `steps` before, and neither says up to where these go.
            CheckpointMismatchError: the loader cannot be brought to the saved position.
            CheckpointError: the directory holds checkpoints that the run did not go on from.
        """
        self._places.take_up()
        progress, position = self._progress, self._progress.position
        if epochs is ...:
            if total_steps is None and self._steps_begun and not position.is_pending:
                raise ArgumentError(
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
            raise ArgumentError("steps() needs a loader, here or in the constructor")
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
            self._save_at_end_of_epoch()

    def _save_at_end_of_epoch(self) -> None:
        if due := tuple(p for p in self._places.all if p.cadence.by_epoch):
            self._journal.saved()
            self._saves.make_due(due)
            self._tell()

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
            ArgumentError: the metrics are none. The step was not counted.
            CheckpointSaveError: a checkpoint could not be made, now or in the background before.
                The step was counted.
            CheckpointError: the directory holds checkpoints that the run did not go on from.
            CheckpointDifferenceError: as ``on_difference`` asks. The step was counted.
            SystemExit: SIGTERM came, and the state is saved.
        """
        found = numbers(metrics)
        self._places.take_up()
        self._watch()
        batches = self._progress.stepped(found)
        self._saves.counted()
        self._journal.stepped(self.step_count, batches.seen, self._progress.metrics)
        due = self._due(found)
        if due:
            self._journal.saved()
            self._saves.make_due(due)
        self._saves.raise_failures()
        self._tell()
        self._end_if_asked()
        return bool(due)

    def _due(self, metrics: Mapping[str, float]) -> tuple[Place, ...]:
        due, main = self._saves.due(), self._places.main
        if main.cadence.by_epoch and not self._steps_begun:
            raise ArgumentError(
                'every="epoch" is for loops over run.steps(...), which know where an epoch ends. '
                "In a loop of your own pass every=None, and call run.save() there"
            )
        if self._only_better is not None and main in due:
            metric, mode = self._only_better
            best = metric in metrics and not self._progress.history.since_best(metric, mode)
            if not self._company.same(self.step_count, best):
                return tuple(p for p in due if p is not main)
        return due

    def _tell(self) -> None:
        for checkpoint in self._saver.made():
            if self._on_saved is not None:
                self._on_saved(checkpoint)

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
            ArgumentError: the metrics, or the tag, are none.
            CheckpointSaveError: none was made, and the earlier ones are as before; or one before
                was not made in the background.
            CheckpointError: somebody else writes into this directory, or it holds checkpoints that
                the run did not go on from.
        """
        added = numbers(metrics)
        if not isinstance(tag, str):
            raise ArgumentError(f"tag must be a text; found {tag!r:.60}")
        self._places.take_up()
        self._journal.saved()
        if wait:
            made = self._saves.make(tag, added)
            self._tell()
            return made
        self._saves.begin(tag, added, (self._places.main,), wait=False)
        return None

    @property
    def last_save(self) -> SaveOutcome | None:
        """What became of the save that ended last; None before one has.

        A save in the background that is still under way is none yet: `close` waits for it.
        """
        return self._saver.last

    @property
    def size_bytes(self) -> int:
        """What a checkpoint of the state as it is takes on disk; of many ranks, this one's share.

        Before an optimizer's first step its state is not there yet, and not counted. Frozen weights
        are, which are stored once.
        """
        return size_bytes(self._saves.snapshot())

    @property
    def staging_bytes(self) -> int:
        """Memory that copies of the state take, from the first save in the background on."""
        return self._saver.staging_bytes

    def _watch(self) -> None:
        self._saves.under_way.watch()
        if self._termination is not None:
            self._termination.watch()

    def _end_if_asked(self) -> None:
        termination = self._termination
        if termination is not None and self._company.ends(self.step_count, asked=termination.asked):
            self.save()
            termination.end()

    # ---- the end

    def close(self) -> None:
        """Ends saves in the background, then lets others write into the directory.

        Saves nothing itself, unless SIGTERM came after the last step. Ctrl-C while it waits leaves
        the save to end on its own; until it has, nobody else may write there.

        Raises:
            CheckpointSaveError: a save in the background has failed, and that was not raised yet;
                or the newest checkpoint could not be copied to a store.
            SystemExit: SIGTERM came after the last step, and the state is saved.
        """
        termination = self._termination
        asked = termination is not None and termination.asked
        try:
            if asked and not self._company.ranked:
                self.save()  # many ranks have no step in common any more
            self._saver.wait()
            self._places.end_uploads()
            self._journal.close()
        finally:
            if termination is not None:
                termination.unwatch()
            self._saves.under_way.unwatch()
            self._progress.unwatch()
            self._saver.at_rest(self._places.release)
        self._saves.raise_failures()
        self._tell()
        if termination is not None and asked:
            termination.end()

    # looked up at an instant when this module's names may be gone
    _is_finalizing = staticmethod(sys.is_finalizing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_finalizing():
            return  # of a generator that nobody ended: modules are gone, the process lets go
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


def _goal(goal: tuple[str, str]) -> tuple[str, str]:
    valid = isinstance(goal, tuple | list) and len(goal) == 2 and isinstance(goal[0], str)
    if not valid or goal[1] not in ("min", "max"):
        raise ArgumentError(
            f'only_better must be (metric, "min" or "max"), such as ("val_loss", "min"); found '
            f"{goal!r:.80}"
        )
    return goal
