"""The loop of transformers' Trainer: entered where a run was, and told when a step is over.

Trainer begins a training at its first batch, or at one that its own checkpoint counts. So methods
of the one trainer that trains are replaced while it does: `_run_epoch`, which is given the epochs
one by one; `_maybe_log_save_evaluate`, after which a step is over; `_finalize_training`. The module
knows these names and what they are given; `refuse_unknown` says where they are others.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import transformers.trainer

from actckpt import Checkpointer
from actckpt.errors import CheckpointError
from actckpt.integrations.trainer_state import Place, TrainingState
from actckpt.resuming.driven import DrivenLoop

_EPOCH = frozenset(
    {
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    }
)
# of what is logged, what no two runs have alike
_TIMES = ("runtime", "per_second")


def trainer_of() -> tuple[Any, Any]:
    """The trainer whose loop calls the callback that calls this, and its resume_from_checkpoint.

    No event is given its trainer. (None, None) where another loop calls.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop":
            given = frame.f_locals
            if isinstance(given.get("self"), transformers.trainer.Trainer):
                return given["self"], given.get("resume_from_checkpoint")
        frame = frame.f_back
    return None, None


def refuse_unknown(trainer: Any) -> None:
    """Raises unless this is a Trainer whose loop is known.

    Raises:
        CheckpointError: it is another.
    """
    method = getattr(trainer, "_run_epoch", None)
    if method is None or not inspect.signature(method).parameters.keys() >= _EPOCH:
        raise CheckpointError(
            f"checkpoints= goes on in the loop of transformers' Trainer as of 5.23; this is "
            f"transformers {transformers.__version__}, whose loop is another. Update it, or leave "
            "checkpoints= out and let Trainer save"
        )


class TrainerLoop:
    """The loop of one training.

    Args:
        run: whose loader the trainer iterates.
        saved: the state of the trainer, of which the run saves the place.
    """

    def __init__(self, trainer: Any, run: Checkpointer, saved: TrainingState) -> None:
        self._trainer = trainer
        self.run = run
        self._saved = saved
        self._driven = DrivenLoop(run)
        self._undo: list[Callable[[], None]] = []
        self._goal: Place | None = None
        self._before_s = 0.0
        self._begun = 0
        self._epoch: dict[str, Any] = {}
        self._counted = trainer.state.global_step

    def begin(self, goal: Place | None) -> None:
        """From now on the loop is watched.

        Args:
            goal: where it goes on; None is the beginning.
        """
        self._goal = goal
        trainer = self._trainer
        self._counted = trainer.state.global_step
        for name in ("_run_epoch", "_maybe_log_save_evaluate", "_finalize_training"):
            own = getattr(self, name)
            self._undo.append(_shadowed(trainer, name, _around(own, getattr(trainer, name))))
        if goal is not None:
            self._before_s = goal.elapsed_s
            handler = trainer.callback_handler
            begin = _around(self._on_epoch_begin, handler.on_epoch_begin)
            self._undo.append(_shadowed(handler, "on_epoch_begin", begin))

    def end(self) -> None:
        """The trainer's methods are its own again."""
        while self._undo:
            self._undo.pop()()

    # ---- around the trainer's methods

    def _on_epoch_begin(self, original: Any, args: Any, state: Any, control: Any) -> Any:
        """Epochs that were over before have no beginning."""
        self._begun += 1
        if self._goal is not None and (self._goal.finished or self._begun <= self._goal.epoch):
            return control
        return original(args, state, control)

    def _run_epoch(self, original: Any, **given: Any) -> None:
        goal, trainer = self._goal, self._trainer
        if goal is not None and goal.finished:
            trainer.control.should_training_stop = True
            return
        if goal is not None and given["epoch"] < goal.epoch:
            return
        given["start_time"] -= self._before_s
        self._saved.began_s = given["start_time"]
        self._epoch = dict(given)
        try:
            if goal is None:
                self._saved.place = Place(given["epoch"])
                original(**given)
            else:
                self._goal = None
                self._resumed(original, goal, given)
            if trainer.control.should_training_stop or self._is_last(given["epoch"]):
                self._saved.place = replace(self._saved.place, left=True, finished=True)
                self.run.save()
        except BaseException as error:
            self.end()
            self.run.__exit__(type(error), error, error.__traceback__)
            raise

    def _resumed(self, original: Any, goal: Place, given: dict[str, Any]) -> None:
        """The rest of the epoch that the run was in."""
        trainer, path = self._trainer, str(self.run.directory)
        # callbacks were told a second time that this epoch began
        self._saved.put(trainer.control)
        given |= {
            "resume_from_checkpoint": path,
            "epochs_trained": goal.epoch,
            "steps_trained_in_current_epoch": goal.batches,
        }
        if goal.left:
            self._driven.goes_on_between()
            accumulated = trainer.args.gradient_accumulation_steps
            given["train_dataloader"] = ()
            given["num_update_steps_per_epoch"] = goal.batches // accumulated
        with _at_its_place(trainer):
            original(**given)

    def _maybe_log_save_evaluate(
        self,
        original: Any,
        tr_loss: Any,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: Any = None,
    ) -> None:
        trainer, place = self._trainer, self._saved.place
        is_step = trainer.state.global_step != self._counted
        if not is_step and grad_norm is None and learning_rate is None:
            # the epoch's end, in a process that made no step in it
            grad_norm, learning_rate = place.grad_norm, place.learning_rate
        original(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        if not is_step:
            return
        self._counted = trainer.state.global_step
        steps = place.steps + 1
        batches = steps * trainer.args.gradient_accumulation_steps
        control = trainer.control
        over = control.should_epoch_stop or steps == self._epoch["num_update_steps_per_epoch"]
        self._saved.place = Place(
            epoch=place.epoch,
            steps=steps,
            batches=min(batches, self._epoch["steps_in_epoch"]),
            over=over,
            left=over or control.should_training_stop,
            max_steps=trainer.state.max_steps,
            elapsed_s=time.time() - start_time,
            grad_norm=None if grad_norm is None else float(grad_norm),
            learning_rate=learning_rate,
        )
        if over:
            self._driven.leaves_pass()
        self.run.step(self._logged())

    def _finalize_training(
        self, original: Any, trial: Any, num_train_samples: Any, start_time: float
    ) -> Any:
        return original(trial, num_train_samples, start_time - self._before_s)

    # ---- what is known

    def _is_last(self, epoch: int) -> bool:
        return bool(epoch + 1 >= self._trainer.state.num_train_epochs)

    def _logged(self) -> dict[str, float]:
        """The numbers that were logged for this step."""
        found: dict[str, float] = {}
        state = self._trainer.state
        for line in reversed(state.log_history):
            if line.get("step") != state.global_step:
                break
            found |= {
                name: value
                for name, value in line.items()
                if isinstance(value, int | float)
                and name not in ("step", "epoch")
                and not any(part in name for part in _TIMES)
            }
        return found


def _around(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return method


def _shadowed(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of an object; returns what puts back what it had."""
    before = vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if before is None:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)

    return undo


@contextmanager
def _at_its_place(trainer: Any) -> Iterator[None]:
    """Meanwhile an epoch is entered whose loader and random states are where they were."""
    skip = transformers.trainer.skip_first_batches

    def as_it_is(loader: Any, _: int = 0) -> Any:
        transformers.trainer.skip_first_batches = skip
        return loader

    transformers.trainer.skip_first_batches = as_it_is
    undo = _shadowed(trainer, "_load_rng_state", lambda _: None)
    try:
        yield
    finally:
        undo()
        transformers.trainer.skip_first_batches = skip
