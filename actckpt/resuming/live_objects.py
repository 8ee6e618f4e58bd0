"""The live objects of a run: their state, whether a saved one fits, and putting it in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import nn

from actckpt.checkpoint.dtypes import name_of
from actckpt.errors import CheckpointMismatchError

# differences that one error message lists
_SHOWN = 3


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def state_of(item: Stateful) -> Any:
    """The state of an object: of its own tensors, not of copies."""
    return item.state_dict()


def fingerprint_of(state: Mapping[str, Any]) -> str:
    """A hash of a model's tensors by name, dtype and shape, whatever their values."""
    lines = (
        f"{name} {name_of(t.dtype)} {list(t.shape)}"
        for name, t in sorted(state.items())
        if isinstance(t, torch.Tensor)
    )
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(chr(10).join(lines).encode())}"


def check_fits(name: str, item: Stateful, saved: Any, where: str) -> None:
    """Raises unless ``item`` can take ``saved``.

    Only of modules and optimizers is it known what they can take.

    Args:
        name, where: of the item and of the checkpoint, for messages.

    Raises:
        CheckpointMismatchError: with the first differing names and shapes.
    """
    if isinstance(item, nn.Module):
        found = list(_module_differences(item.state_dict(), saved))
    elif isinstance(item, torch.optim.Optimizer):
        found = list(_optimizer_differences(item.state_dict(), saved))
    else:
        return
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CheckpointMismatchError(
            f"{where} does not fit this {name}: {'; '.join(found[:_SHOWN])}{more}. Build the "
            f"{name} that was saved, or start in another directory. Nothing was changed"
        )


def _module_differences(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Any:
    for key in [*live, *(k for k in saved if k not in live)]:
        here, there = live.get(key), saved.get(key)
        if key not in saved:
            yield f"{key} {_described(here)} is not in the checkpoint"
        elif key not in live:
            yield f"{key} {_described(there)} is only in the checkpoint"
        elif _described(here) != _described(there):
            yield f"{key} is {_described(here)}, saved was {_described(there)}"


def _described(x: Any) -> str:
    return f"{name_of(x.dtype)} {list(x.shape)}" if isinstance(x, torch.Tensor) else ""


def _optimizer_differences(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Any:
    here = [len(group["params"]) for group in live["param_groups"]]
    there = [len(group["params"]) for group in saved["param_groups"]]
    if here != there:
        yield f"it has groups of {here} parameters, saved were groups of {there}"
        return
    for number, (a, b) in enumerate(
        zip(live["param_groups"], saved["param_groups"], strict=True)
    ):
        if missing := sorted(a.keys() - b.keys()):
            yield f"the saved group {number} has no {', '.join(missing)}: another optimizer"


def put_state(item: Stateful, saved: Any) -> Callable[[], None]:
    """Puts a state in that fits; returns what undoes it.

    Raises:
        Exception: whatever the object raises; it is then as before.
    """
    undo = _undo(item)
    try:
        item.load_state_dict(saved)
        if isinstance(item, torch.optim.Optimizer):
            _put_exact(item, saved)
    except BaseException:
        undo()
        raise
    return undo


def _undo(item: Stateful) -> Callable[[], None]:
    if isinstance(item, torch.optim.Optimizer):
        # loading rebinds the state, and does not write into it
        before = item.state_dict()
    elif isinstance(item, nn.Module) and loads_as_plain(item):
        # what has been checked cannot fail to load, and a second copy could be too much
        return lambda: None
    else:
        before = copy.deepcopy(item.state_dict())

    def undo() -> None:
        item.load_state_dict(before)

    return undo


def loads_as_plain(module: nn.Module) -> bool:
    """Whether loading copies tensors by name and runs no code of others."""
    own = type(module).load_state_dict is nn.Module.load_state_dict
    return own and all(
        type(m)._load_from_state_dict.__module__.startswith("torch.nn.")
        and type(m).set_extra_state is nn.Module.set_extra_state
        and not m._load_state_dict_pre_hooks
        and not m._load_state_dict_post_hooks
        for m in module.modules()
    )


def _put_exact(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undoes torch's casts of the state to the parameters' dtype.

    A float32 moment of a bfloat16 parameter would come back rounded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            live = optimizer.state[parameter].get(key)
            if isinstance(live, torch.Tensor) and live.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(live.device)
