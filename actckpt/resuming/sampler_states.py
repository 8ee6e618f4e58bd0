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

from torch.utils.data import DataLoader, Dataset

from actckpt.checkpoint.encoding import encode
from actckpt.errors import CheckpointSaveError
from actckpt.resuming.attributes import attribute_digest, kept_attribute, put_attribute
from actckpt.resuming.generators import is_generator
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import is_known, samplers_of

# what there is to put back of a loader whose samplers a library knows
NOTHING_KEPT: dict[str, Any] = {"digests": {}, "values": {}, "own": {}}


class SamplerStates:
    """The samplers of one loader that no library knows, from when its run begins.

    Args:
        loader: or whatever has its samplers as attributes.
    """

    def __init__(self, loader: Any) -> None:
        self._all = samplers_of(loader)
        self.samplers = {n: s for n, s in enumerate(self._all) if not is_known(s)}
        self._before = self.digests()
        self._changed: set[str] = set()

    def digests(self) -> dict[str, str]:
        """Of every attribute, by its number and name; "" of what cannot be looked into."""
        return {key: attribute_digest(value) for key, value in self._attributes()}

    def state_dict(self) -> dict[str, Any]:
        """As they are now; no live object is part of it."""
        digests = self.digests()
        self._changed |= {k for k, digest in digests.items() if self._before.get(k) != digest}
        values: dict[str, Any] = {}
        lost: list[str] = []
        for key, value in self._attributes():
            if key in self._changed:
                try:
                    values[key] = kept_attribute(value, key)
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
                put_attribute(self.samplers[number], name, copy.deepcopy(value))

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
        for number, sampler in self.samplers.items():
            for name, value in getattr(sampler, "__dict__", {}).items():
                apart = isinstance(value, types.ModuleType | Dataset | DataLoader)
                if not apart and not is_generator(value) and all(value is not s for s in self._all):
                    yield f"{number} {name}", value


def _parts(key: str) -> tuple[int, str]:
    number, _, name = key.partition(" ")
    return int(number), name


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
