"""`MemoryBudget`: Hugging Face's Trainer within a memory budget, and resumed to the last bit."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from actckpt import PlanError
from actckpt.errors import CheckpointError
from actckpt.integrations.budget_arguments import BudgetArguments
from actckpt.integrations.replicas import no_replicas, wrapper_of
from actckpt.integrations.trainer_loop import TrainerLoop, refuse_unknown, trainer_of
from actckpt.integrations.trainer_models import models_beside
from actckpt.integrations.trainer_state import TrainingState

logger = logging.getLogger("actckpt")


class MemoryBudget(BudgetArguments, TrainerCallback):  # type: ignore[misc]
    """A callback with which a Trainer trains within a memory budget, and resumes bit for bit.

        trainer = Trainer(model, arguments, train_dataset=data,
                          callbacks=[MemoryBudget("8GB", checkpoints="runs/a")])
        trainer.train()

    The plan is made in the first training step, for what Trainer, accelerate and TRL have made of
    the model, with the optimizer and accumulated gradients counted; where nothing fits, it raises
    there. Losses, gradients and weights are bitwise those of the untouched model. When training
    ends the model is as it was.

    With ``checkpoints`` the full state of the run is kept there, beside what Trainer saves:
    weights, optimizer, schedule, random states, the place in the data, TrainerState, sums of the
    logs, and the states of callbacks that are `ExportableState`. Killed at any instant and started
    again, the same script goes on from there: every later loss and the final weights are those of
    the run that was not killed. Where that cannot be, `resumed` says why.

    The budget bounds a training step: forward, backward and the optimizer's step, with what lies
    beside the model through it (a reference model, a loss with weights). Evaluation,
    prediction and ``generate`` run without gradients and without a plan, do not replace it, and may
    take more: their batch size is yours to choose.

    Args:
        budget_gb: as for `actckpt.optimize`. None with a policy of another name than "auto" applies
            that without a bound, and with "auto" only keeps checkpoints.
        checkpoints: a directory of this training alone, made if it does not exist.
        every: of optimizer steps, or a duration, or "auto"; as for `actckpt.Checkpointer`, and so
            are ``keep_last``, ``keep_best`` (of what Trainer logs, such as "eval_loss") and
            ``fresh``.
        extra: further objects of the run, by name, as for `actckpt.Checkpointer`: a teacher that
            follows the model, a memory bank. They are saved and put back with it.
        policy: as for `actckpt.optimize`.
        scope: as for `actckpt.optimize`.

    Attributes:
        report: of the plan that the training ran under.
        run: the `actckpt.Checkpointer`, during and after ``train``; None before, and without
            ``checkpoints``.
        resumed: what resuming found; None where the training began anew.

    Raises:
        BudgetError, PlanError, ArgumentError: an argument is not what it must be.

    Raises (from ``train``):
        BudgetError, PlanError, TraceError: as `actckpt.optimize`.
        CheckpointError: ``resume_from_checkpoint`` was given beside ``checkpoints``, or the loop is
            no Trainer's; or as `actckpt.Checkpointer`.
    """

    _begins = "trainer.train()"
    _loop: TrainerLoop | None = None

    # ---- Trainer's events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Plans from now on, and puts the run back to where it was."""
        assert model is not None
        self._end()
        trainer, resume_from_checkpoint = trainer_of()
        wrapped = model if trainer is None else trainer.model_wrapped
        _refuse(args, wrapped)
        if self._plans:
            _refuse_checkpointing(args)
        if self._checkpoints is not None:
            _refuse_to_resume(args, trainer, resume_from_checkpoint)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps it
        beside = {} if trainer is None else models_beside(trainer, model)
        called = wrapped if isinstance(wrapped, DistributedDataParallel) else model
        self._optimize(called, inner, args.gradient_accumulation_steps > 1, beside)
        if self._checkpoints is None:
            return
        try:
            self._resume(trainer, control, inner, lr_scheduler, train_dataloader)
        except BaseException:
            self._end()
            raise

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The model is as it was, and the directory is somebody else's to write in."""
        self._end()

    # ---- the run

    def _resume(
        self, trainer: Any, control: TrainerControl, optimizer: Any, scheduler: Any, loader: Any
    ) -> None:
        saved = TrainingState(trainer, self._extra.values())
        run = self._checkpointer(
            model=trainer.model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=trainer.accelerator.scaler,
            loader=loader,
            own={"trainer": saved},
        )
        assert run is not None
        self._loop = loop = TrainerLoop(trainer, run, saved)
        resumed = run.resume()
        self.resumed = None
        if resumed is None:
            loop.begin(None)
            return
        reasons = saved.put(control)
        self.resumed = dataclasses.replace(resumed, inexact=(*resumed.inexact, *reasons))
        loop.begin(saved.place)
        level = logging.INFO if self.resumed.bit_exact else logging.WARNING
        logger.log(level, "actckpt: %s", self.resumed)

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        self._revert()
        if loop is not None:
            loop.end()
            loop.run.close()


def _refuse(args: TrainingArguments, wrapped: Any) -> None:
    """Trainings that no plan is made for."""
    if args.world_size > 1 and wrapper_of(wrapped) is None:
        raise no_replicas(
            f"this training has {args.world_size} processes around a {type(wrapped).__name__}",
            "Start it with torchrun, without fsdp= and deepspeed=",
        )
    if args.n_gpu > 1:
        raise no_replicas(
            f"this training has one process with {args.n_gpu} devices",
            f"Start one for each, as in torchrun --nproc-per-node {args.n_gpu}, or let it see one "
            "alone, with CUDA_VISIBLE_DEVICES=0",
        )


def _refuse_checkpointing(args: TrainingArguments) -> None:
    """Trainings that recompute already."""
    given = vars(args)
    # of transformers 5.23 on the second is another name for the first, which it deprecates
    names = [n for n in ("activation_checkpointing", "gradient_checkpointing") if n in given]
    if any(given[name] for name in names):
        raise PlanError(
            f"the training arguments have {names[0]}=True (TRL's default), which recomputes whole "
            f"blocks: pass {names[0]}=False, MemoryBudget takes its place"
        )


def _refuse_to_resume(args: TrainingArguments, trainer: Any, resume_from_checkpoint: Any) -> None:
    """Trainings that cannot go on from a place of ours."""
    if trainer is None:
        raise CheckpointError(
            "checkpoints= goes on in the loop of transformers' Trainer, and this one is another: "
            "leave checkpoints= out, and keep the run with actckpt.Checkpointer"
        )
    refuse_unknown(trainer)
    if resume_from_checkpoint is not None:
        raise CheckpointError(
            f"resume_from_checkpoint={resume_from_checkpoint!r} beside checkpoints=: both would "
            "put the training back. Call trainer.train() alone, which goes on from the newest "
            "in checkpoints=; or leave checkpoints= out"
        )
    if args.ignore_data_skip:
        raise CheckpointError(
            "ignore_data_skip=True beside checkpoints=: a resumed training goes on at its place in "
            "the data. Leave it out, or leave checkpoints= out"
        )
