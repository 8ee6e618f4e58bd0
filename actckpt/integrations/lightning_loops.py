"""Lightning's fit loop: entered where a run was, and saved between two batches or two epochs.

What Lightning does to resume is not used: it loses a batch of a stream, and an epoch or its hooks
where a checkpoint was made at an epoch's end. A run is saved at two places of the loop, and put
back there: before a batch is fetched, when all that belongs to the one before has been done, and
before an epoch begins, when all that belongs to the one before has. At these places the loops of
the one trainer that trains are given methods of their own, by a class derived from Lightning's.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import RestartStage, _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.trainer.states import RunningStage

from actckpt import Checkpointer
from actckpt.errors import CheckpointError
from actckpt.integrations.lightning_state import TrainerState
from actckpt.resuming.driven import DrivenLoop, RandomBefore
from actckpt.resuming.loaders import length_of

logger = logging.getLogger("actckpt")


class Training:
    """One ``fit``.

    Args:
        budget: the `MemoryBudget` that it trains under.

    Attributes:
        is_ready: optimizers and strategy are set up; what runs the loop before tries something out.
    """

    def __init__(self, budget: Any, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._budget = budget
        self._trainer = trainer
        self.module = module
        self.is_ready = False
        self._planned = False
        self._run: Checkpointer | None = None
        self._driven: DrivenLoop | None = None
        self._saved = TrainerState(trainer, module)
        self._begun_from: RandomBefore | None = None
        self._counted = 0
        self._validated = False
        # what a resumed run still has to do: nothing, or go on "within" an epoch or "between" two
        self._enters = ""
        self._undo = [_derived(trainer.fit_loop, FitLoop, self)]
        self._undo.append(_derived(trainer.fit_loop.epoch_loop, EpochLoop, self))

    # ---- its begin and end

    def begin(self) -> None:
        """The loop begins, of the model as it is trained."""
        trainer = self._trainer
        self._budget.plan(self.module, trainer.optimizers)
        self._planned = True
        loop = trainer.fit_loop
        if loop._combined_loader is not None:
            # a schedule has asked how many steps there are, and so for the loader
            self._resume()
            if self._run is not None:
                self._begin_anew(loop)

    def _begin_anew(self, loop: _FitLoop) -> None:
        """Iterates what was iterated before anybody looked, from what that began from."""
        assert self._begun_from is not None
        if self._enters == "within":
            iter(loop._data_fetcher)
        elif not self._enters:
            with self._begun_from.again():
                iter(loop._data_fetcher)

    def loader_made(self) -> None:
        """The loop has its loader, and iterates it next."""
        if self._planned:
            if self._run is not None:
                raise _no("reload_dataloaders_every_n_epochs gives it another loader meanwhile")
            self._resume()
        else:
            loader = self._trainer.fit_loop._combined_loader
            self._begun_from = RandomBefore(loader.flattened)

    def _resume(self) -> None:
        if not self._budget.keeps:
            return
        trainer = self._trainer
        loader, reads_ahead = _the_loader(trainer)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        run = self._run = self._budget.checkpointer(
            model=self.module,
            optimizer=trainer.optimizers,
            loader=loader,
            own={
                "lightning": self._saved,
                **{f"scheduler-{n}": one for n, one in enumerate(schedulers)},
            },
        )
        self._driven = DrivenLoop(run, reads_ahead=reads_ahead)
        resumed = run.resume()
        if resumed is not None:
            reasons = self._saved.put()
            resumed = dataclasses.replace(resumed, inexact=(*resumed.inexact, *reasons))
            self._enters = "within" if resumed.batch else "between"
            if self._enters == "between":
                self._driven.waits()
            for reason in resumed.inexact:
                logger.warning("actckpt: not resumed bit for bit: %s", reason)
            logger.info("actckpt: %s", resumed)
        self._budget.resumed = resumed
        self._counted = trainer.global_step

    def end(self, error: BaseException | None = None) -> None:
        """The model is as it was, and the directory is somebody else's to write in."""
        run, self._run = self._run, None
        if self._planned:
            self._planned = False
            self._budget.revert()
        self.release()
        if run is not None:
            run.__exit__(None if error is None else type(error), error, None)

    def release(self) -> None:
        """The loops are Lightning's own again."""
        while self._undo:
            self._undo.pop()()

    # ---- places of the loop

    def enters(self) -> None:
        """What begins a training was done, and the first epoch comes next."""
        loop = self._trainer.fit_loop
        self._saved.put_settings()
        if self._enters == "within":
            loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH  # its hooks have run
            loop._resuming_from_checkpoint = True  # its loader is iterated

    @property
    def goes_on_between(self) -> bool:
        """Whether a resumed run goes on where an epoch had ended; then all may have."""
        return self._enters == "between"

    def goes_on_within(self) -> bool:
        """Whether an epoch goes on that had begun; said once."""
        within = self._enters == "within"
        if within:
            self._enters = "before a batch"
        return within

    def between_batches(self) -> None:
        """All that belongs to the batches before was done."""
        if self._run is None:
            return
        assert self._driven is not None
        if self._enters:
            self._enters = ""
            self._driven.goes_on_within()
        self._driven.reads()
        self._count()

    def between_epochs(self) -> None:
        """All that belongs to the epochs before was done."""
        if self._run is None or self._enters == "within":
            return
        assert self._driven is not None
        if self._enters == "between":
            self._enters = ""
            self._driven.goes_on_between()
            return
        self._driven.leaves_pass()
        self._count()

    def over(self) -> None:
        """No epoch is left."""
        if self._run is None:
            return
        self.between_epochs()
        if self._budget.saves_the_end:
            self._run.save()

    def validated(self) -> None:
        """Validation has ended."""
        self._validated = True

    def _count(self) -> None:
        assert self._run is not None
        steps = self._trainer.global_step
        validated, self._validated = self._validated, False
        if steps != self._counted:
            self._counted = steps
            self._run.step(dict(self._trainer.callback_metrics) if validated else None)


class FitLoop(_FitLoop):  # type: ignore[misc]
    """Lightning's, with what a `Training` does at its places."""

    actckpt: Training

    def run(self) -> None:
        """As Lightning's; what is trained under a budget and kept is this."""
        training = self.actckpt
        if not training.is_ready:
            super().run()
            return
        try:
            training.begin()
            super().run()
            training.end()
        except BaseException as error:
            training.end(error)
            raise

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; what ends a run is done again by a resumed one."""
        return bool(super().skip) and not self.actckpt.goes_on_between

    def _load_combined_loader_states(self) -> None:
        super()._load_combined_loader_states()
        self.actckpt.loader_made()

    def on_run_start(self) -> None:
        """As Lightning's."""
        super().on_run_start()
        self.actckpt.enters()

    def on_advance_start(self) -> None:
        """As Lightning's."""
        self.actckpt.between_epochs()
        super().on_advance_start()

    def on_run_end(self) -> None:
        """As Lightning's."""
        self.actckpt.over()
        super().on_run_end()


class EpochLoop(_TrainingEpochLoop):  # type: ignore[misc]
    """Lightning's, with what a `Training` does at its places."""

    actckpt: Training

    def reset(self) -> None:
        """As Lightning's, but for an epoch that goes on: its counters are where they were."""
        if not self.actckpt.goes_on_within():
            super().reset()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """As Lightning's."""
        self.actckpt.between_batches()
        super().advance(data_fetcher)


def _derived(loop: Any, kind: type, training: Training) -> Callable[[], None]:
    """Gives a loop of Lightning's a class derived from its own; returns what undoes that."""
    original = type(loop)
    if original not in kind.__bases__:
        raise CheckpointError(
            f"MemoryBudget trains in the loop of Lightning 2.6; this trainer has a "
            f"{original.__module__}.{original.__qualname__}. Update Lightning, or leave "
            "MemoryBudget out"
        )
    loop.__class__ = kind
    loop.actckpt = training

    def undo() -> None:
        loop.__class__ = original
        del loop.actckpt

    return undo


def _the_loader(trainer: pl.Trainer) -> tuple[Any, bool]:
    """The loader whose place is kept, and whether Lightning reads it a batch ahead.

    Raises:
        CheckpointError: its place cannot be kept.
    """
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened
    if len(loaders) != 1:
        raise _no(f"train_dataloader gives {len(loaders)} loaders that are read at once")
    if trainer.reload_dataloaders_every_n_epochs:
        raise _no("reload_dataloaders_every_n_epochs gives it another loader meanwhile")
    if _takes_the_iterator(trainer):
        raise _no("training_step takes the loader's iterator itself (dataloader_iter)")
    limit = combined.limits[0] if combined.limits else float("inf")
    reads_ahead = length_of(loaders[0]) is None and limit == float("inf")
    return loaders[0], reads_ahead


def _takes_the_iterator(trainer: pl.Trainer) -> bool:
    return isinstance(
        _select_data_fetcher(trainer, RunningStage.TRAINING), _DataLoaderIterDataFetcher
    )


def _no(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the place in the data cannot be kept: {reason}. Leave checkpoints= out, or train with "
        "one loader for the whole run. No step was made"
    )
