"""What transformers' Trainer counts and keeps beside model and optimizer, as a state of a run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from actckpt.integrations.trainer_attributes import OwnAttributes

# sums that logs are made of, and what they began from
_SUMS = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_initial_num_input_tokens_seen",
    "current_flos",
)
# the same of TRL's trainers, where there are any
_SUMS_OF_TRL = ("_metrics", "_total_train_tokens")
# of those, tables of texts that are printed and go nowhere else
_PRINTED_BY_TRL = ("_logs",)
# of the TrainerState: what the trainer makes from its arguments
_FROM_ARGUMENTS = frozenset(
    {
        "eval_steps",
        "is_hyper_param_search",
        "is_local_process_zero",
        "is_world_process_zero",
        "logging_steps",
        "max_steps",
        "num_train_epochs",
        "save_steps",
        "stateful_callbacks",
        "train_batch_size",
        "trial_name",
        "trial_params",
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a loop is, after an optimizer step and all that the trainer does for it.

    Args:
        epoch: which one it is in, from 0.
        steps: optimizer steps in this epoch.
        batches: batches that were trained on in this epoch.
        over: the epoch was read to its end, or a callback has ended it.
        left: no more is read in this epoch; what the trainer does at its end is still to be done.
        finished: nothing is left to be done.
        max_steps: of the training, as its arguments were.
        elapsed_s: since the training began, in all its processes.
        grad_norm, learning_rate: of the last step, for the log at the epoch's end.
    """

    epoch: int = 0
    steps: int = 0
    batches: int = 0
    over: bool = False
    left: bool = False
    finished: bool = False
    max_steps: int = 0
    elapsed_s: float = 0.0
    grad_norm: float | None = None
    learning_rate: float | None = None

    def beyond(self, step: int, max_steps: int) -> Place:
        """Where a training that was finished goes on, if it is to be longer than it was.

        Args:
            step: optimizer steps that were made.
            max_steps: that are to be made now.
        """
        if not self.finished or step < self.max_steps or step >= max_steps:
            return self
        if self.over:
            return Place(self.epoch + 1, elapsed_s=self.elapsed_s)
        return replace(self, left=False, finished=False)


class TrainingState:
    """TrainerState, control, sums and callbacks of a trainer, and its place.

    Args:
        kept: what is saved with the run besides.
    """

    def __init__(self, trainer: Any, kept: Iterable[object] = ()) -> None:
        self._trainer = trainer
        self.place = Place()
        self.began_s = time.time()
        self._loaded: dict[str, Any] | None = None
        self._own = OwnAttributes(trainer, (*_SUMS, *_SUMS_OF_TRL, *_PRINTED_BY_TRL), kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        trainer = self._trainer
        return {
            "state": {
                f.name: getattr(trainer.state, f.name)
                for f in fields(trainer.state)
                if f.name not in _FROM_ARGUMENTS
            },
            "control": dict(vars(trainer.control)),
            "sums": {name: _plain(getattr(trainer, name)) for name in self._sums()},
            "callbacks": [
                [type(callback).__qualname__, callback.state()["attributes"]]
                for callback in self._exportable()
            ],
            "own": self._own.state_dict(),
            "place": {f.name: getattr(self.place, f.name) for f in fields(Place)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; `put` puts it in."""
        self._loaded = state
        self.place = Place(**state["place"])

    def put(self, control: Any) -> list[str]:
        """Puts in what was loaded; returns why the run may go on otherwise.

        Args:
            control: that the trainer goes on with.
        """
        loaded, trainer = self._loaded, self._trainer
        assert loaded is not None
        for name, value in loaded["state"].items():
            setattr(trainer.state, name, list(value) if isinstance(value, list) else value)
        for name, value in loaded["control"].items():
            setattr(control, name, value)
        self.place = Place(**loaded["place"]).beyond(
            trainer.state.global_step, trainer.state.max_steps
        )
        if not self.place.left:
            control.should_training_stop = False
        for name, value in loaded["sums"].items():
            if isinstance(value, torch.Tensor):
                value = value.clone().to(trainer.args.device)
            if name in _SUMS_OF_TRL:
                _put_into(trainer, name, value)
            else:
                setattr(trainer, name, value)
        # a version that kept none of them has saved none
        own = self._own.put(loaded["own"]) if "own" in loaded else self._own.unknown()
        return self._put_callbacks(loaded["callbacks"]) + own

    def _put_callbacks(self, saved: list[list[Any]]) -> list[str]:
        here = self._exportable()
        for callback, (kind, attributes) in zip(here, saved, strict=False):
            if type(callback).__qualname__ != kind:
                break
            for name, value in attributes.items():
                setattr(callback, name, value)
        kinds, were = [type(c).__qualname__ for c in here], [kind for kind, _ in saved]
        found = []
        if kinds != were:
            found.append(f"callbacks with a state were {were}, are {kinds}")
        return found + [
            f"{type(callback).__qualname__} keeps what no checkpoint holds: make it an "
            "ExportableState"
            for callback in self._trainer.callback_handler.callbacks
            if _keeps_unseen(callback)
        ]

    def _exportable(self) -> list[Any]:
        callbacks = self._trainer.callback_handler.callbacks
        return [c for c in callbacks if isinstance(c, ExportableState)]

    def _sums(self) -> list[str]:
        own = vars(self._trainer)
        return [*_SUMS, *(name for name in _SUMS_OF_TRL if name in own)]


def _keeps_unseen(callback: TrainerCallback) -> bool:
    """Whether a callback of the user's own has attributes that it does not export."""
    foreign = type(callback).__module__.partition(".")[0] not in _KNOWN
    return foreign and bool(vars(callback)) and not isinstance(callback, ExportableState)


# what their callbacks keep is no part of a training's course
_KNOWN = ("actckpt", "transformers", "trl", "sentence_transformers")


def _plain(value: Any) -> Any:
    """A nest of dicts as plain ones; a tensor that goes on being added to as it is now."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


def _put_into(trainer: Any, name: str, value: Any) -> None:
    """Puts back sums by mode, whose dicts make their own missing entries."""
    here = getattr(trainer, name)
    if not isinstance(value, dict):
        setattr(trainer, name, value)
        return
    for mode, sums in value.items():
        if isinstance(sums, dict):
            here[mode].clear()
            here[mode].update(sums)
        else:
            here[mode] = sums
