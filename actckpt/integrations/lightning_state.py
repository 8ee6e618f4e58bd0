"""What a Lightning trainer holds beside model and optimizers, as a state of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer import call

from actckpt.integrations.lightning_logged import (
    gather_metrics,
    gather_results,
    put_metrics,
    put_results,
)

# what Lightning's checkpoints hold and a run keeps itself, or nobody goes by
_OURS = frozenset({"callbacks", "state_dict", "pytorch-lightning_version", "epoch", "global_step"})
# of the trainer, what callbacks set while it trains
_SETTINGS = ("accumulate_grad_batches", "should_stop")
_LOGGED = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


class TrainerState:
    """Counters, logged values and callbacks of a trainer."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._loaded: dict[str, Any] | None = None
        self._settings: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        connector = trainer._logger_connector
        checkpoint, of_model = self._checkpoint()
        return {
            "epoch_progress": loop.epoch_progress.state_dict(),
            "epoch_loop": loop.epoch_loop.state_dict(),
            "skips_backward": loop._skip_backward,
            "settings": {name: getattr(trainer, name) for name in _SETTINGS},
            "callbacks": checkpoint.get("callbacks", {}),
            "hooks": {n: x for n, x in checkpoint.items() if n not in _OURS and n not in of_model},
            "of-model": of_model,
            "results": gather_results(loop.epoch_loop._results, self._module),
            "metrics": gather_metrics(self._module),
            "logged": {name: dict(getattr(connector, name)) for name in _LOGGED},
            "current_fx": connector._current_fx,
            "first_loop_iter": connector._first_loop_iter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; `put` puts it in, once the model is put back."""
        self._loaded = state

    def put(self) -> list[str]:
        """Puts in what was loaded; returns why the run may go on otherwise."""
        loaded, self._loaded = self._loaded, None
        assert loaded is not None
        trainer, loop = self._trainer, self._trainer.fit_loop
        loop.epoch_progress.load_state_dict(loaded["epoch_progress"])
        loop.epoch_loop.load_state_dict(loaded["epoch_loop"])
        for one in _loops(loop):
            # nothing of what Lightning does to resume
            vars(one).update(
                _restarting=False, _loaded_from_state_dict=False, _resuming_from_checkpoint=False
            )
        loop._skip_backward = loaded["skips_backward"]
        self._settings = loaded["settings"]
        put_metrics(self._module, loaded["metrics"])
        put_results(loop.epoch_loop._results, loaded["results"], self._module, trainer)
        connector = trainer._logger_connector
        for name, values in loaded["logged"].items():
            setattr(connector, name, {k: _here(v, self._module.device) for k, v in values.items()})
        connector._current_fx = loaded["current_fx"]
        connector._first_loop_iter = loaded["first_loop_iter"]
        return self._put_callbacks(loaded)

    def put_settings(self) -> None:
        """Puts in what callbacks had set, once they have seen what the user had."""
        for name, value in self._settings.items():
            setattr(self._trainer, name, value)

    # ---- what hooks save

    def _checkpoint(self) -> tuple[dict[str, Any], list[str]]:
        """What callbacks, module and data module would put into a checkpoint of Lightning's.

        Beside it the names of what is the model's own state.
        """
        trainer = self._trainer
        weights = self._module.state_dict()
        checkpoint: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": weights,
            "callbacks": call._call_callbacks_state_dict(trainer),
        }
        precision = trainer.precision_plugin
        if state := precision.state_dict():
            checkpoint[type(precision).__qualname__] = state
        if trainer.datamodule is not None:
            state = call._call_lightning_datamodule_hook(trainer, "state_dict")
            if state:
                checkpoint[type(trainer.datamodule).__qualname__] = state
        call._call_callbacks_on_save_checkpoint(trainer, checkpoint)
        call._call_lightning_module_hook(trainer, "on_save_checkpoint", checkpoint)
        of_model = [name for name, x in checkpoint.items() if x is weights]
        if "state_dict" not in of_model:  # an average stands in its place
            checkpoint["average"] = checkpoint["state_dict"]
        return checkpoint, of_model

    def _put_callbacks(self, loaded: dict[str, Any]) -> list[str]:
        """Gives the hooks what they have saved, in Lightning's order."""
        trainer, module = self._trainer, self._module
        checkpoint = dict(loaded["hooks"])
        average = checkpoint.pop("average", None)
        checkpoint |= {name: module.state_dict() for name in loaded["of-model"]}
        if average is not None:
            checkpoint["state_dict"] = average
        checkpoint |= {
            "callbacks": loaded["callbacks"],
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": pl.__version__,
        }
        call._call_lightning_module_hook(trainer, "on_load_checkpoint", checkpoint)
        if (data := trainer.datamodule) is not None and type(data).__qualname__ in checkpoint:
            state = checkpoint[type(data).__qualname__]
            call._call_lightning_datamodule_hook(trainer, "load_state_dict", state)
        call._call_callbacks_on_load_checkpoint(trainer, checkpoint)
        call._call_callbacks_load_state_dict(trainer, checkpoint)
        precision = trainer.precision_plugin
        if (state := checkpoint.get(type(precision).__qualname__)) is not None:
            precision.load_state_dict(state)
        for callback in trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging):
                _set_up_averaging(trainer, module, callback)
        here = {callback.state_key for callback in trainer.callbacks}
        gone = sorted(loaded["callbacks"].keys() - here)
        return [f"the callback {key} was saved and is not here" for key in gone]


def _set_up_averaging(
    trainer: pl.Trainer, module: pl.LightningModule, average: StochasticWeightAveraging
) -> None:
    """Has stochastic weight averaging begin where it had begun, without its first average.

    It sets up its schedule at the beginning of an epoch, from where its learning rates go.
    """
    if average._scheduler_state is None:
        return
    average._clear_schedulers(trainer)
    progress = trainer.fit_loop.epoch_progress.current
    epoch, progress.completed = progress.completed, average._latest_update_epoch
    (optimizer,) = trainer.optimizers
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        average.on_train_epoch_start(trainer, module)
    finally:
        progress.completed = epoch
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in group.keys() - saved.keys() - {"params"}:
            del group[key]
        group.update(saved)


def _loops(loop: _Loop) -> Iterator[_Loop]:
    yield loop
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            yield from _loops(inner)


def _here(value: Any, device: Any) -> Any:
    return value.to(device) if hasattr(value, "to") else value
