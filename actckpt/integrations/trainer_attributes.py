"""What a Trainer of another class than transformers' keeps of its own, in its attributes.

TRL's GRPO counts its steps and trains several times on what it generated once; a `compute_loss` of
the user's own may keep an average. Nobody is told of these: what has changed since training began
is kept, and everything is compared. Of models beside the trained one it is said if they change.
"""

from __future__ import annotations

import copy
import dis
import io
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import transformers.trainer
from torch.utils._pytree import tree_leaves, tree_map

from actckpt.errors import CheckpointSaveError
from actckpt.integrations.trainer_models import weights_beside
from actckpt.resuming.attributes import kept_attribute, put_attribute, read_attribute
from actckpt.resuming.batch_digest import BatchDigest
from actckpt.resuming.generators import is_generator

# of one attribute: some tenths of a second with every save
_MOST_OBJECTS = 100_000
_WEIGHTS = "'s weights"
_LOST = "changes as it trains, and no checkpoint can hold it"
_OTHER = "is another than it was, and was not kept"
_OTHER_WEIGHTS = "are others than they were, and were not kept"
_LOST_WEIGHTS = (
    "change as it trains, and are not kept: give the model to MemoryBudget, as extra={name: model}"
)


class OwnAttributes:
    """Those of one trainer, from when its training begins.

    Args:
        besides: names of what is kept otherwise.
        kept: objects that are, whatever their names.
    """

    def __init__(self, trainer: Any, besides: Collection[str], kept: Iterable[object] = ()) -> None:
        self._trainer = trainer
        self._kept = tuple(kept)
        self._besides = _stored_by_transformers() | set(besides)
        self._before = self._texts()
        self._changed: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What has changed since, digests of the rest, and names of what no checkpoint can hold."""
        own, read = dict(self._own()), self._read()
        opaque = {name: found.opaque[0] for name, found in read.items() if found.opaque}
        now = {name: found.text for name, found in read.items() if name not in opaque}
        self._changed |= {n for n in now if self._before.get(n) != now[n]}
        values: dict[str, Any] = {}
        devices: dict[str, list[str]] = {}
        lost = sorted(self._changed & now.keys() - own.keys())  # models
        for name in sorted(self._changed & now.keys() & own.keys()):
            try:
                values[name] = kept_attribute(own[name], name)
            except CheckpointSaveError:
                lost.append(name)
                continue
            devices[name] = [_device(x) for x in tree_leaves(own[name])]
        return {
            "values": values,
            "devices": devices,
            "lost": lost,
            "opaque": opaque,
            "digests": now,
        }

    def put(self, state: dict[str, Any]) -> list[str]:
        """Puts back what `state_dict` gave; returns why the run may go on otherwise."""
        kind = type(self._trainer).__qualname__
        self._changed |= {*state["values"], *state["lost"]}
        for name, value in state["values"].items():
            places = iter(state["devices"][name])
            # what is loaded stays as it is: it may be put a second time
            moved = tree_map(
                lambda x, places=places: self._moved(x, next(places)), copy.deepcopy(value)
            )
            put_attribute(self._trainer, name, moved)
        reasons = [
            f"{kind}.{name} {_LOST_WEIGHTS if name.endswith(_WEIGHTS) else _LOST}"
            for name in state["lost"]
        ]
        reasons += [
            f"{kind}.{name} cannot be compared ({why})" for name, why in state["opaque"].items()
        ]
        here, there = self._texts(), state["digests"]
        return reasons + [
            f"{kind}.{name} {_OTHER_WEIGHTS if name.endswith(_WEIGHTS) else _OTHER}"
            for name in sorted(here.keys() | there.keys())
            if name not in state["lost"]
            and name not in state["opaque"]
            and here.get(name) != there.get(name)
        ]

    def unknown(self) -> list[str]:
        """Why a run may go on otherwise of which nothing was kept."""
        names = sorted(name for name, _ in self._own())
        if not names:
            return []
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        return [
            f"the version that saved kept no attributes of {type(self._trainer).__qualname__} "
            f"({shown})"
        ]

    def _moved(self, x: Any, place: str) -> Any:
        """A value where it was, on the device that this process trains on."""
        if place in ("", "cpu"):
            return x
        return x.to(self._trainer.args.device)

    def _texts(self) -> dict[str, str]:
        """The digests of what can be looked into."""
        return {name: found.text for name, found in self._read().items() if not found.opaque}

    def _read(self) -> dict[str, BatchDigest]:
        found = {
            name: read_attribute(value, most_objects=_MOST_OBJECTS, apart=_is_apart)
            for name, value in self._own()
        }
        models = weights_beside(self._trainer, self._kept)
        return found | {name + _WEIGHTS: read_attribute(w) for name, w in models.items()}

    def _own(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self._trainer).items():
            of_run = any(value is x for x in self._kept)
            if name not in self._besides and not of_run and not _is_apart(value):
                yield name, value


# what has a state of its own, is data, or no part of a training's course
_APART = (
    io.IOBase,
    types.ModuleType,
    types.GeneratorType,  # of which, as of random ones, a run says itself what it can save
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.utils.data.Dataset,
    torch.utils.data.DataLoader,
    transformers.trainer.Trainer,
)
_APART_PACKAGES = frozenset({"accelerate", "actckpt", "datasets", "logging"})
# of which what can be called, tokenizers and processors, is the same for every call
_CALLED_ALIKE = frozenset({"tokenizers", "transformers"})


def _is_apart(x: Any) -> bool:
    code = isinstance(x, types.FunctionType | types.MethodType)
    package = str((x if code else type(x)).__module__).partition(".")[0]
    if package in _CALLED_ALIKE and callable(x):
        return True
    return isinstance(x, _APART) or package in _APART_PACKAGES or is_generator(x)


def _stored_by_transformers() -> set[str]:
    """The attributes that transformers' Trainer itself sets: kept, or the same in every process."""
    found: set[str] = set()
    for kind in transformers.trainer.Trainer.__mro__:
        for function in vars(kind).values():
            code = getattr(function, "__code__", None)
            if code is not None:
                found |= _stored_on_self(code)
    return found


def _stored_on_self(code: types.CodeType) -> set[str]:
    """What a method sets on its own object, and not on others."""
    found = set()
    loaded: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "EXTENDED_ARG":
            continue
        # newer Pythons load two names in one step: the last is what is stored on
        on = loaded[-1] if isinstance(loaded, tuple) and loaded else loaded
        if step.opname == "STORE_ATTR" and on == "self":
            found.add(str(step.argval))
        loaded = step.argval
    return found


def _device(x: Any) -> str:
    return x.device.type if isinstance(x, torch.Tensor) else ""
