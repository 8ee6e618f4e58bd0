"""`MemoryBudget`: Lightning's Trainer within a memory budget, and resumed to the last bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from actckpt import Checkpointer
from actckpt.errors import CheckpointError
from actckpt.integrations.budget_arguments import BudgetArguments
from actckpt.integrations.lightning_loops import Training
from actckpt.integrations.replicas import no_replicas, wrapper_of


class MemoryBudget(BudgetArguments, pl.Callback):  # type: ignore[misc]
    """A callback with which a Trainer trains within a memory budget, and resumes bit for bit.

        trainer = lightning.Trainer(max_epochs=3,
                                    callbacks=[MemoryBudget("8GB", checkpoints="runs/a")])
        trainer.fit(model, loader)

    ``training_step`` is planned with the first batch, as precision and strategy have made it, for
    the optimizers that `configure_optimizers` gave and for gradients that are there when a step
    begins, as Lightning leaves them. Where nothing fits, that raises. Losses, gradients and weights
    are bitwise those of the untouched model. When ``fit`` ends the model is as it was.

    With ``checkpoints`` the full state of the run is kept there, beside what ModelCheckpoint saves:
    weights, optimizers, schedules, random states, the place in the data, the loops' counters,
    logged sums, torchmetrics, and the states of callbacks and of the data module. Killed at any
    instant and started again, the same script goes on from there: every later loss, validation and
    the final weights are those of the run that was not killed. Where that cannot be, `resumed` says
    why. A run that has ended is not trained again.

    The budget bounds a training step: forward, backward and the optimizer's step. Validation runs
    without gradients and without a plan, does not replace it, and may take more: its batch size is
    yours to choose.

    Args:
        budget_gb: as for `actckpt.optimize`; None with a policy of another name than "auto" applies
            that without a bound, and with "auto" only keeps checkpoints.
        checkpoints: a directory of this run alone, made if it does not exist.
        every: of optimizer steps, or a duration, or "auto"; as for `actckpt.Checkpointer`, and so
            are ``keep_last``, ``keep_best`` (of what validation logs, such as
            ``("val_loss", "min", 1)``) and ``fresh``. But for None the end of the run is saved too.
            What is due at an epoch's last step is saved when the epoch's hooks have run.
        extra: further objects of the run, by name, as for `actckpt.Checkpointer`: what changes as
            it trains, and is no part of the LightningModule.
        policy: as for `actckpt.optimize`.
        scope: as for `actckpt.optimize`.

    Attributes:
        report: of the plan that the training ran under.
        run: the `actckpt.Checkpointer`, during and after ``fit``; None before, and without
            ``checkpoints``.
        resumed: what resuming found; None where the run began anew.

    Raises:
        BudgetError, PlanError, ArgumentError: an argument is not what it must be.

    Raises (from ``fit``):
        BudgetError, PlanError, TraceError: as `actckpt.optimize`.
        CheckpointError: ``ckpt_path`` was given beside ``checkpoints``, or the place in the data
            cannot be kept; or as `actckpt.Checkpointer`.
    """

    _begins = "trainer.fit()"
    _training: Training | None = None

    # ---- Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watches the loops from now on."""
        if stage != "fit":
            return
        _refuse(trainer)
        self._end()
        self._training = Training(self, trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All that a plan depends on is known."""
        if self._checkpoints is not None and trainer.ckpt_path is not None:
            raise CheckpointError(
                f"ckpt_path={str(trainer.ckpt_path)!r} beside checkpoints=: both would put the run "
                "back. Call trainer.fit(model) alone, which goes on from the newest in "
                "checkpoints=; or leave checkpoints= out. No step was made"
            )
        assert self._training is not None
        self._training.is_ready = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What it has logged belongs to the step before."""
        if self._training is not None and not trainer.sanity_checking:
            self._training.validated()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The loops are Lightning's own again."""
        if stage == "fit":
            self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The same."""
        self._end()

    # ---- what a training asks

    def plan(self, module: pl.LightningModule, optimizers: list[Any]) -> None:
        """Plans on the first batch."""
        wrapper = wrapper_of(module.trainer.strategy.model)
        self._optimize(module if wrapper is None else wrapper, optimizers, accumulate=True)

    def checkpointer(self, **objects: Any) -> Checkpointer | None:
        """The run that keeps checkpoints of these; None without ``checkpoints``."""
        return self._checkpointer(**objects)

    @property
    def keeps(self) -> bool:
        """Whether there is a directory for checkpoints."""
        return self._checkpoints is not None

    @property
    def saves_the_end(self) -> bool:
        """Whether the end of the run is saved, too."""
        return self._keeping["every"] is not None

    def revert(self) -> None:
        """The model is as it was."""
        self._revert()

    def _end(self) -> None:
        training, self._training = self._training, None
        if training is not None:
            training.release()


def _refuse(trainer: pl.Trainer) -> None:
    """Trainings that no plan is made for."""
    strategy = trainer.strategy
    whole = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if trainer.world_size > 1 and not whole:
        raise no_replicas(
            f"this trainer has {trainer.world_size} processes under {type(strategy).__name__}",
            'Pass Trainer(strategy="ddp")',
        )
