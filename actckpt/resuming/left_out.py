"""What a foreign optimizer's own state leaves out: found on a copy, saved beside, put back.

Wrappers of optimizers count steps, keep flags and slow weights; some leave a part of that out of
``state_dict``, and some lose the groups that they share with the optimizer inside. So what was
saved is loaded into a copy as it was when the run began, and compared with the living one.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from actckpt.checkpoint.decoding import decode
from actckpt.checkpoint.encoding import Encoded
from actckpt.errors import CheckpointSaveError
from actckpt.resuming.live_objects import is_of_torch, relinked

# of a copy's state when a run begins; a larger one is not copied
_MOST_BYTES = 64 << 20
_DEEPEST = 8

# how one comes from an object to what it holds: ("attribute" or "key", name), or ("parameter", n)
Path = tuple[tuple[str, Any], ...]


class LeftOut:
    """What the states of some objects leave out.

    Args:
        objects: what the run was given, as they are when it begins.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = {n: x for n, x in objects.items() if _is_foreign(x)}
        self._fresh = {n: _copied(x, _parameters(x)) for n, x in self._objects.items()}

    def item(
        self, states: Mapping[str, Encoded], loadable: Callable[[str, Any, Any], Any]
    ) -> dict[str, Any]:
        """(path, value) of everything that loading these states would not bring back, by item.

        Nothing of an optimizer whose state is cut over ranks: no copy of it can be compared here.

        Args:
            loadable: for (item, optimizer, saved state) what the optimizer's own loading takes.

        Raises:
            CheckpointSaveError: a state cannot be loaded at all.
        """
        found: dict[str, Any] = {}
        for name, x in self._objects.items():
            fresh = self._fresh[name]
            probe = None if fresh is None else _copied(fresh, _parameters(fresh))
            encoded = states[name]
            if probe is None or encoded.shards:
                continue
            try:
                with relinked(probe):
                    state = decode(encoded.tree, encoded.tensors, name)
                    probe.load_state_dict(loadable(name, probe, state))
            except Exception as error:
                raise CheckpointSaveError(
                    f"the state of the {name}, a {type(x).__name__}, can be saved and not be put "
                    f"back: {type(error).__name__}: {error!s:.300}. Pass the optimizer inside it, "
                    "or an object whose load_state_dict takes what its state_dict gives"
                ) from error
            here, there = dict(_parts(x)), dict(_parts(probe))
            lost = [(path, v) for path, v in here.items() if not _same(v, there.get(path, _NONE))]
            if lost:
                found[name] = [[[list(p) for p in path], value] for path, value in lost]
        return found

    def put(self, item: Mapping[str, Any] | None) -> list[str]:
        """Puts back what `item` gave; returns what has no place any more."""
        reasons = []
        for name, parts in (item or {}).items():
            for path, value in parts:
                x = self._objects.get(name)
                if x is not None and not _set(x, [tuple(p) for p in path], value):
                    reasons.append(f"{path[-1][1]} of the {name} has no place here")
        return reasons


_NONE = object()


def _is_foreign(x: Any) -> bool:
    """Whether it is an optimizer whose state is put back by other code than torch's."""
    return hasattr(x, "param_groups") and not is_of_torch(x)


def _parameters(x: Any) -> list[torch.Tensor]:
    return [p for group in x.param_groups for p in group["params"]]


def _copied(x: Any, parameters: list[torch.Tensor]) -> Any:
    """A copy with the same parameters, not made by the object's own code; None if there is none."""
    try:
        size_bytes = sum(v.numel() * v.itemsize for _, v in _parts(x)
                         if isinstance(v, torch.Tensor))  # fmt: skip
        if size_bytes > _MOST_BYTES:
            return None
        return _shell(x, {id(p): p for p in parameters})
    except Exception:
        return None  # it holds what cannot be copied: nothing can be told of it


def _shell(x: Any, memo: dict[int, Any]) -> Any:
    if id(x) in memo:
        return memo[id(x)]
    made = memo[id(x)] = object.__new__(type(x))
    for name, value in vars(x).items():
        inner = isinstance(value, torch.optim.Optimizer)
        made.__dict__[name] = _shell(value, memo) if inner else copy.deepcopy(value, memo)
    return made


def _parts(x: Any) -> Iterator[tuple[Path, Any]]:
    """(path, value) of the numbers, texts and tensors of an optimizer, but its parameters."""
    numbers = {id(p): n for n, p in enumerate(_parameters(x))}
    seen: set[int] = set()

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if value is None or isinstance(value, bool | int | float | str):
            yield path, value
        elif isinstance(value, torch.Tensor):
            if id(value) not in numbers:
                yield path, value
        elif len(path) < _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            for step, part in _steps(value, numbers):
                yield from walk(part, (*path, step))

    yield from walk(x, ())


def _steps(value: Any, numbers: Mapping[int, int]) -> Iterator[tuple[tuple[str, Any], Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if isinstance(key, torch.Tensor):
                if id(key) in numbers:
                    yield ("parameter", numbers[id(key)]), part
            elif key is None or isinstance(key, bool | int | float | str):
                yield ("key", key), part
    elif isinstance(value, list | tuple | deque):
        for index, part in enumerate(value):
            yield ("key", index), part
    elif hasattr(value, "param_groups"):
        for name, part in vars(value).items():
            if not name.startswith("_") and name != "defaults":
                yield ("attribute", name), part


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return type(a) is type(b) and (a == b or a != a)


def _set(x: Any, path: list[tuple[str, Any]], value: Any) -> bool:
    """Whether there was a place for the value, where it is now."""
    parameters = _parameters(x)
    at = x
    for how, key in path[:-1]:
        where = parameters[key] if how == "parameter" else key
        try:
            at = vars(at)[key] if how == "attribute" else at[where]
        except (KeyError, IndexError, TypeError):
            return False
    how, key = path[-1]
    if isinstance(value, torch.Tensor):
        value = value.to(parameters[0].device)
    if how == "attribute":
        vars(at)[key] = value
    elif isinstance(at, list | dict):
        at[parameters[key] if how == "parameter" else key] = value
    else:
        return False
    return True
