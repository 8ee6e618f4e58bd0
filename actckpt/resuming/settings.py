"""Settings that the code gives an optimizer or a schedule, and a checkpoint puts back over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

# what a user chooses; groups hold states of some optimizers, too, which change with every step
_CHOSEN = (
    "initial_lr", "max_lr", "min_lr", "weight_decay", "momentum", "dampening", "nesterov", "betas",
    "eps", "alpha", "centered", "rho", "lambd", "lr_decay", "etas", "step_sizes", "momentum_decay",
    "max_momentum", "base_momentum", "amsgrad", "maximize", "foreach", "fused", "capturable",
    "decoupled_weight_decay",
)  # fmt: skip
# what moves with a schedule; of its state, all else that is not private was chosen
_MOVING = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i", "lr_lambdas"}


def setting_notes(objects: Mapping[str, Any], items: Mapping[str, Any]) -> list[str]:
    """What the code has set otherwise than the state that is about to be put back.

    Args:
        objects: of the run, by item, before anything is put into them.
        items: of the checkpoint.
    """
    notes: dict[str, None] = {}
    for name, x in objects.items():
        if isinstance(x, torch.optim.Optimizer) and "param_groups" in items[name]:
            notes |= dict.fromkeys(_of_groups(name, x.param_groups, items[name]["param_groups"]))
        elif (schedule := schedule_of(x)) is not None:
            notes |= dict.fromkeys(_of_schedule(name, schedule.state_dict(), items[name]))
    return list(notes)


def schedule_of(x: Any) -> Any:
    """The learning rate schedule that an object is, or wraps; or None."""
    for found in (x, getattr(x, "scheduler", None)):
        if isinstance(found, torch.optim.lr_scheduler.LRScheduler):
            return found
    return None


def _of_groups(name: str, here: list[Any], saved: list[Any]) -> Iterator[str]:
    for number, (mine, theirs) in enumerate(zip(here, saved, strict=False)):
        scheduled = "initial_lr" in mine and "initial_lr" in theirs
        # a schedule that cycles momentum moves it in the group
        cycled = "max_momentum" in theirs or "base_momentum" in theirs
        skipped = {"momentum", "betas"} if cycled else set()
        for key in (*(() if scheduled else ("lr",)), *_CHOSEN):
            if key in mine and key in theirs and key not in skipped:
                which = f" of group {number}" if len(here) > 1 else ""
                yield from _note(f"{name} {key}{which}", mine[key], theirs[key])


def _of_schedule(name: str, here: Any, saved: Any) -> Iterator[str]:
    if not isinstance(here, Mapping) or not isinstance(saved, Mapping):
        return
    for key in here:
        if key in saved and key not in _MOVING and not key.startswith("_"):
            yield from _note(f"{name} {key}", here[key], saved[key])
    parts = here.get("_schedulers", ()), saved.get("_schedulers", ())
    for number, (mine, theirs) in enumerate(zip(*parts, strict=False)):
        yield from _of_schedule(f"{name}[{number}]", mine, theirs)


def _note(what: str, here: Any, saved: Any) -> Iterator[str]:
    mine, theirs = _plain(here), _plain(saved)
    if mine is not None and theirs is not None and mine != theirs:
        yield f"{what} was {theirs:.60} and stays so; the code sets {mine:.60}"


def _plain(x: Any) -> str | None:
    """A setting as text that tells it from others; None where it is none."""
    if isinstance(x, torch.Tensor):
        return repr(x.tolist()) if x.numel() <= 16 else None
    if isinstance(x, list | tuple):
        parts = [_plain(v) for v in x]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if isinstance(x, Mapping):
        pairs = [f"{k!r}: {_plain(v)}" for k, v in sorted(x.items(), key=repr)]
        return f"{{{', '.join(pairs)}}}"
    return repr(x) if x is None or isinstance(x, bool | int | float | str) else None
