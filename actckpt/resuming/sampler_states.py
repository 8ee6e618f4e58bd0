"""What samplers of the user's own keep beside generators: saved, put back, and compared.

A library's sampler keeps nothing else. Of any other, those attributes are its state that changed
since the run began: losses that order a curriculum, a count of epochs. The others are how it was
made, and have to be the same again.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from actckpt.checkpoint.encoding import encode
from actckpt.errors import CheckpointSaveError
from actckpt.resuming.batch_digest import batch_digest
from actckpt.resuming.generators import is_generator
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import is_known, samplers_of

# longer lists are not written as JSON with every checkpoint
_LONGEST = 100_000


# what there is to put back of a loader whose samplers a library knows
NOTHING_KEPT: dict[str, Any] = {"digests": {}, "values": {}, "own": {}}


class SamplerStates:
    """The samplers of one loader that no library knows, from when its run begins.

    Args:
        loader: or whatever has its samplers as attributes.
    """

    def __init__(self, loader: Any) -> None:
        self.samplers = {n: s for n, s in enumerate(samplers_of(loader)) if not is_known(s)}
        self._before = self.digests()
        self._changed: set[str] = set()

    def digests(self) -> dict[str, str]:
        """Of every attribute, by its number and name; "" of what cannot be looked into."""
        return {key: _digest(value) for key, value in self._attributes()}

    def state_dict(self) -> dict[str, Any]:
        """As they are now; no live object is part of it."""
        digests = self.digests()
        self._changed |= {k for k, digest in digests.items() if self._before.get(k) != digest}
        values: dict[str, Any] = {}
        lost: list[str] = []
        for key, value in self._attributes():
            if key in self._changed:
                try:
                    values[key] = _kept(value, key)
                except CheckpointSaveError:
                    lost.append(key)
        # what it says of itself, where its attributes do not say all
        own = {str(n): _own_state(s) for n, s in self.samplers.items()} if lost else {}
        return {"digests": digests, "values": values, "own": own}

    def put(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, as far as it is another."""
        for number, own in state["own"].items():
            sampler = self.samplers.get(int(number))
            if own is not None and isinstance(sampler, Stateful):
                sampler.load_state_dict(copy.deepcopy(own))
        here = self.digests()
        for key, value in state["values"].items():
            self._changed.add(key)
            number, name = _parts(key)
            if number in self.samplers and here.get(key) != state["digests"][key]:
                _put_attribute(self.samplers[number], name, copy.deepcopy(value))

    def different(self, state: dict[str, Any]) -> list[str]:
        """The attributes that are others than in a state, or cannot be compared."""
        here, there = self.digests(), state["digests"]
        return [
            self._named(key)
            for key in dict.fromkeys([*there, *here])
            if here.get(key) != there.get(key) or here.get(key) == ""
        ]

    def _named(self, key: str) -> str:
        number, name = _parts(key)
        sampler = self.samplers.get(number)
        return f"{'sampler' if sampler is None else type(sampler).__qualname__}.{name}"

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """(key, value) of what is neither a generator nor an object of its own."""
        others = list(self.samplers.values())
        for number, sampler in self.samplers.items():
            for name, value in getattr(sampler, "__dict__", {}).items():
                apart = isinstance(value, types.ModuleType | Dataset | DataLoader)
                if not apart and not is_generator(value) and all(value is not s for s in others):
                    yield f"{number} {name}", value


def _parts(key: str) -> tuple[int, str]:
    number, _, name = key.partition(" ")
    return int(number), name


def _digest(value: Any) -> str:
    """Of an attribute; "" where it cannot be looked into."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        value = [value.__qualname__, cells, list(value.__defaults__ or ())]
    elif isinstance(value, type | types.BuiltinFunctionType):
        value = value.__qualname__
    digest = batch_digest(value)
    return "" if digest.omitted else digest.text


def _kept(value: Any, key: str) -> Any:
    """A copy of a value that a checkpoint can hold."""
    if isinstance(value, list | dict | tuple | set) and len(value) > _LONGEST:
        raise CheckpointSaveError(f"{key} has {len(value)} entries")
    encode(value, key)
    return copy.deepcopy(value)


def _own_state(sampler: Any) -> Any:
    """What a sampler says of itself, if it does and a checkpoint can hold it."""
    if not isinstance(sampler, Stateful):
        return None
    state = sampler.state_dict()
    try:
        encode(state, "the sampler's state")
    except CheckpointSaveError:
        return None
    return copy.deepcopy(state)


def _put_attribute(sampler: Any, name: str, value: Any) -> None:
    """In place where that can be done: others may hold the same list."""
    live: Any = getattr(sampler, "__dict__", {}).get(name)
    if type(live) is type(value) is list:
        live[:] = value
    elif type(live) is type(value) and isinstance(live, dict):
        live.clear()
        live.update(value)
    elif isinstance(live, torch.Tensor | np.ndarray) and _alike(live, value):
        with torch.no_grad():
            live[...] = value
    else:
        setattr(sampler, name, value)


def _alike(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype
