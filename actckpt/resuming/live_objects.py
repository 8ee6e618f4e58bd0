"""The live objects of a run: their state, whether a saved one fits, and putting it in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import nn

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.wrapped_names import explain
from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.parameter_names import ParameterNames
from actckpt.resuming.quantized import scale_keys, without_scales

# differences that one error message lists
_SHOWN = 3


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


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
    wrapped = ""
    if isinstance(item, nn.Module):
        here: Mapping[str, Any] = item.state_dict()
        skipped = scale_keys(item, here) & scale_keys(item, saved)
        here, saved = _but(here, skipped), _but(saved, skipped)
        found = list(_module_differences(here, saved))
        wrapped = explain(here, saved) if found else ""
    elif isinstance(item, torch.optim.Optimizer):
        found = list(_optimizer_differences(item.state_dict(), saved))
    else:
        return
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        listed = f"{'; '.join(found[:_SHOWN])}{more}"
        works = f"Build the {name} that was saved, or start in another directory"
        raise CheckpointMismatchError(
            f"{where} does not fit this {name}: {wrapped or f'{listed}. {works}'}. "
            "Nothing was changed"
        )


def _module_differences(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for key in [*live, *(k for k in saved if k not in live)]:
        here, there = live.get(key), saved.get(key)
        if key not in saved:
            yield f"{key} {_described(here)} is not in the checkpoint"
        elif key not in live:
            yield f"{key} {_described(there)} is only in the checkpoint"
        elif _described(here) != _described(there):
            yield f"{key} is {_described(here)}, saved was {_described(there)}"


def _but(state: Mapping[str, Any], keys: set[str]) -> Mapping[str, Any]:
    return {key: x for key, x in state.items() if key not in keys} if keys else state


def _described(x: Any) -> str:
    return f"{name_of(x.dtype)} {list(x.shape)}" if isinstance(x, torch.Tensor) else ""


def _optimizer_differences(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    if not has_groups(live) or not has_groups(saved):
        return  # of a wrapper, which alone knows it
    here = [len(group["params"]) for group in live["param_groups"]]
    there = [len(group["params"]) for group in saved["param_groups"]]
    if here != there:
        yield f"it has groups of {here} parameters, saved were groups of {there}"


def has_groups(state: Any) -> bool:
    """Whether a state is of the form that torch's optimizers give it."""
    return isinstance(state, Mapping) and "param_groups" in state and "state" in state


def identity_of(item: Stateful, names: ParameterNames) -> dict[str, Any]:
    """What tells that a state is of another object, where the state itself does not.

    An optimizer knows its parameters by their numbers alone: given in another order, it would take
    the state of one for the other's.
    """
    found: dict[str, Any] = {"kind": type(item).__qualname__}
    if isinstance(item, torch.optim.Optimizer):
        found["parameters"] = [
            [names.of(p) for p in group["params"]] for group in item.param_groups
        ]
    return found


def doubts(name: str, here: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """What of an identity that `check_identity` lets pass nobody can tell, or save.

    Args:
        name: of the item, for messages.
    """
    pairs = [
        (f"parameter {n} of group {number}", x, y)
        for number, (a, b) in enumerate(
            zip(here.get("parameters", []), saved.get("parameters", []), strict=False)
        )
        for n, (x, y) in enumerate(zip(a, b, strict=False))
    ]
    found = []
    if lost := [which for which, x, _ in pairs if not x]:
        found.append(
            f"{lost[0]} of the {name}{_more(lost)} is in nothing that was passed: its value is in "
            "no checkpoint"
        )
    if untold := [which for which, x, y in pairs if x and not y]:
        found.append(
            f"{untold[0]} of the {name}{_more(untold)} was saved without a name: whether it is the "
            "same cannot be told"
        )
    return found


def _more(which: list[str]) -> str:
    return f" (and {len(which) - 1} more)" if len(which) > 1 else ""


def check_identity(name: str, here: dict[str, Any], saved: dict[str, Any], where: str) -> None:
    """Raises unless both are what `identity_of` says of one and the same object.

    Raises:
        CheckpointMismatchError: it is of another class, or has its parameters in another order.
    """
    if here["kind"] != saved["kind"]:
        raise CheckpointMismatchError(
            f"{where} holds the {name} of a {saved['kind']}, this is a {here['kind']}: build what "
            "was saved, or restore with only=. Nothing was changed"
        )
    mine, theirs = here.get("parameters", []), saved.get("parameters", [])
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        for n, (x, y) in enumerate(zip(a, b, strict=False)):
            # a version that named those of the model alone may have saved it
            if x != y and y:
                raise CheckpointMismatchError(
                    f"{where}: parameter {n} of group {number} of the {name} is {x or 'unnamed'}, "
                    f"saved was {y}: give it the parameters in the order in which "
                    "they were saved. Nothing was changed"
                )


def put_state(item: Stateful, saved: Any) -> Callable[[], None]:
    """Puts a state in that fits; returns what undoes it.

    Raises:
        Exception: whatever the object raises; it is then as before.
    """
    rest, put_scales = saved, None
    if isinstance(item, nn.Module):
        rest, put_scales = without_scales(item, saved)
    undo = _undo(item)
    try:
        with relinked(item):
            item.load_state_dict(rest)
        if put_scales is not None:
            put_scales()
        if isinstance(item, torch.optim.Optimizer):
            _put_exact(item, saved)
    except BaseException:
        undo()
        raise
    return undo


@contextmanager
def relinked(optimizer: Any) -> Iterator[None]:
    """Keeps groups and states shared that a wrapper shares with the optimizer inside.

    Loading gives that one new ones, and what a schedule then sets would reach only one of the two.
    """
    held = vars(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else {}
    inner = [x for x in held.values() if isinstance(x, torch.optim.Optimizer)]
    shared = [
        (key, vars(x))
        for key in ("param_groups", "state")
        for x in inner
        if key in held and held[key] is vars(x).get(key)
    ]
    yield
    for key, of_inner in shared:
        held[key] = of_inner[key]


def _undo(item: Stateful) -> Callable[[], None]:
    if is_of_torch(item) and isinstance(item, torch.optim.Optimizer):
        # loading rebinds the state, and does not write into it
        before = item.state_dict()
    elif cannot_fail(item):
        # what has been checked cannot fail to load, and a second copy could be too much
        return lambda: None
    else:
        before = copy.deepcopy(item.state_dict())

    def undo() -> None:
        item.load_state_dict(before)

    return undo


def is_of_torch(item: Any) -> bool:
    """Whether its state is put back by torch's own code, which is known to do it."""
    where: str = type(item).load_state_dict.__module__
    return where.partition(".")[0] == "torch"


def cannot_fail(item: Stateful) -> bool:
    """Whether loading a state that fits copies tensors by name, and runs no code of others."""
    return (
        isinstance(item, nn.Module)
        and type(item).load_state_dict is nn.Module.load_state_dict
        and all(
            type(m)._load_from_state_dict.__module__.startswith("torch.nn.")
            and type(m).set_extra_state is nn.Module.set_extra_state
            and not m._load_state_dict_pre_hooks
            and not m._load_state_dict_post_hooks
            for m in item.modules()
        )
    )


def _put_exact(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undoes torch's casts of the state to the parameters' dtype.

    A float32 moment of a bfloat16 parameter would come back rounded.
    """
    if not has_groups(saved):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            live = optimizer.state[parameter].get(key)
            if isinstance(live, torch.Tensor) and live.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(live.device)
