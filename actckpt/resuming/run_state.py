"""The state of a run as items of a checkpoint, and back: all of it, or nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.encoding import Encoded, encode
from actckpt.checkpoint.names import is_item_name
from actckpt.errors import ArgumentError, CheckpointMismatchError
from actckpt.resuming.buffers import Buffers, OtherBuffers
from actckpt.resuming.config import checked_config
from actckpt.resuming.functions import functions_item, other_functions
from actckpt.resuming.gradients import Gradients
from actckpt.resuming.left_out import LeftOut
from actckpt.resuming.live_objects import (
    Stateful,
    cannot_fail,
    check_fits,
    check_identity,
    doubts,
    fingerprint_of,
    has_groups,
    identity_of,
    put_state,
)
from actckpt.resuming.loadable import check_loadable
from actckpt.resuming.optimizer_items import is_optimizer_item, with_every_optimizer
from actckpt.resuming.optimizer_names import by_name, by_number, is_by_name, names_of
from actckpt.resuming.parameter_names import ParameterNames, named_parameters
from actckpt.resuming.plans import gather_inner_plans, gather_plans, put_all_plans
from actckpt.resuming.random_states import lost_random_states
from actckpt.resuming.resumed import version_differences
from actckpt.resuming.settings import setting_notes
from actckpt.resuming.untrained import with_frozen
from actckpt.resuming.wrapper_prefix import renamed, unwrapped
from actckpt.versions import versions

# items that every checkpoint has, beside the objects that the user passes
OWN = ("identities", "module-versions", "progress", "position", "random", "generators", "under-way",
       "functions", "left-out", "plans", "inner-plans", "config")  # fmt: skip

# objects of the library's own, made of what the user passes
_DERIVED = ("gradients", "buffers", "other-buffers")
# items that checkpoints of earlier versions do not have
_LATER = ("other-buffers",)


@dataclass(frozen=True, slots=True)
class Fitting:
    """A saved state that these objects can take.

    Args:
        items: what is put.
        objects: into which.
        whole: whether that is everything.
        doubted: what cannot be told of it.
        notes: what else is different.
    """

    items: dict[str, Any]
    objects: dict[str, Stateful]
    whole: bool
    doubted: list[str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Put:
    """What putting a state back left to be said; as in `Resumed`."""

    inexact: tuple[str, ...]
    plan: str
    notes: tuple[str, ...]


class RunState:
    """The objects of a run.

    Args:
        ranked: whether other ranks have the same, or other parts of it: a state is then what
            theirs can be joined with, by names that no wrapper has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        others: Mapping[str, Stateful | None],
        config: Mapping[str, Any] | None,
        *,
        ranked: bool = False,
    ) -> None:
        self._ranked = ranked
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module; found {type(model).__name__}")
        model = unwrapped(model) if ranked else model
        self._model = model
        self._objects: dict[str, Stateful] = {"model": model}
        self._objects |= {name: item for name, item in others.items() if item is not None}
        given = dict(self._objects)
        self._objects["gradients"] = Gradients(given)
        self._objects["buffers"] = Buffers(model)
        self._objects["other-buffers"] = OtherBuffers(
            {n: x for n, x in given.items() if isinstance(x, nn.Module) and x is not model}
        )
        for name, item in self._objects.items():
            if not is_item_name(name):
                raise ArgumentError(
                    f"{name!r:.120} cannot be the name of a file: use letters, digits, - and _"
                )
            if isinstance(item, type):
                raise ArgumentError(
                    f"{name} is the class {item.__name__}: pass the object that the loop uses"
                )
            if not isinstance(item, Stateful):
                raise ArgumentError(
                    f"{name} must have state_dict and load_state_dict; found {type(item).__name__}"
                )
        self._config = checked_config(config)
        self._left_out = LeftOut(given)
        self._parameter_names = {name for name, _ in model.named_parameters()}

    @property
    def model(self) -> nn.Module:
        """The module that is saved and put back."""
        return self._model

    @property
    def objects(self) -> dict[str, Stateful]:
        """What the user has passed, by the names of their items."""
        return {name: item for name, item in self._objects.items() if name not in _DERIVED}

    def gather(
        self,
        progress: Mapping[str, Any],
        *,
        accumulating: bool,
    ) -> dict[str, Encoded]:
        """Every item, encoded; tensors are the objects' own.

        Args:
            progress: the items of `Progress`.
            accumulating: gradients are needed still; otherwise the next step begins without them.

        Raises:
            CheckpointSaveError: something in a state can be saved in no way; named by its key.
        """
        states = self._states()
        for name, item in self._objects.items():
            if isinstance(item, nn.Module):
                check_loadable(name, item, states[name])
        if not accumulating:
            states["gradients"] = {}
        states["identities"] = self._identities()
        # the versions that modules keep in a state dict, for loading older ones
        states["module-versions"] = {
            name: dict(states[name]._metadata)
            for name, item in self._objects.items()
            if isinstance(item, nn.Module) and hasattr(states[name], "_metadata")
        }
        states.update(progress)
        states["functions"] = functions_item(self.objects)
        states["plans"] = gather_plans(self._model)
        states["inner-plans"] = gather_inner_plans(self.objects)
        states["config"] = self._config
        encoded = {
            name: encode(state, name, sharded=self._ranked) for name, state in states.items()
        }
        encoded["left-out"] = encode(self._left_out.item(encoded, self._numbered), "left-out")
        # what many ranks hold is written whole, each its share
        return encoded if self._ranked else with_frozen(encoded, self._objects)

    def _numbered(self, name: str, optimizer: Any, state: Any) -> Any:
        """The state of an optimizer as its own code gives and takes it."""
        if not is_by_name(state):
            return state
        return by_number(name, optimizer, ParameterNames(self.objects), state, (), "the state")

    def _states(self) -> dict[str, Any]:
        states = {name: item.state_dict() for name, item in self._objects.items()}
        if self._ranked:
            names = ParameterNames(self.objects)
            for name, item in self._objects.items():
                if isinstance(item, torch.optim.Optimizer) and has_groups(states[name]):
                    states[name] = by_name(name, item, names, states[name])
        return states

    def like(self) -> Callable[[str, str, tuple[int, ...]], Any]:
        """For (item, name, shape) of a tensor the distributed one that it is to be cut like.

        That is the one that the run has there; or, of an optimizer that has not made its state
        yet, the parameter that it belongs to.
        """
        live = {
            f"{item}/{name}": shard.whole
            for item, state in self._states().items()
            for name, shard in encode(state, item, sharded=True).shards.items()
        }
        parameters = dict(named_parameters(self.objects))

        def found(item: str, name: str, shape: tuple[int, ...]) -> Any:
            there = live.get(f"{item}/{name}")
            if there is None:
                there = next((parameters[p] for p in name.split("/") if p in parameters), None)
                if there is None or not hasattr(there, "__create_chunk_list__"):
                    return None
            return there if tuple(there.shape) == shape else None

        return found

    def is_steady(self, item: str, name: str) -> bool:
        """Whether only an optimizer step changes this tensor, as far as such a thing is known."""
        return is_optimizer_item(item) or (item == "model" and name in self._parameter_names)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of torch's among the objects."""
        found = self._objects.values()
        return [item for item in found if isinstance(item, torch.optim.Optimizer)]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those among the objects, by what the names of their parameters begin with: the model's
        own with nothing.
        """
        found = {name: x for name, x in self.objects.items() if isinstance(x, nn.Module)}
        return {"" if name == "model" else name: item for name, item in found.items()}

    @property
    def joined(self) -> frozenset[str]:
        """Items of which ranks have parts each, told by the names of tensors and parameters: what
        all have is one state. Of any other item each rank has its own.
        """
        kinds = (nn.Module, torch.optim.Optimizer)
        parts = frozenset(
            name
            for name, item in self.objects.items()
            if isinstance(item, kinds) or is_optimizer_item(name)
        )
        return parts.union(OWN, _DERIVED)

    def fingerprint(self) -> str:
        """Of the model's tensors."""
        return fingerprint_of(self._model.state_dict())

    def versions(self) -> dict[str, str]:
        """Of libraries and machine."""
        return versions()

    def names(self) -> frozenset[str]:
        """By item and name, the tensors of modules and the parameters of optimizers."""
        called = ParameterNames(self.objects)
        found: list[str] = []
        for item, x in self.objects.items():
            if isinstance(x, nn.Module):
                found += (f"{item}/{key}" for key in x.state_dict())
            elif isinstance(x, torch.optim.Optimizer):
                found += (f"{item}/{n}" for group in names_of(item, x, called) for n in group)
        return frozenset(found)

    def fitting(
        self,
        items: dict[str, Any],
        where: str,
        only: frozenset[str] | None,
        elsewhere: frozenset[str] = frozenset(),
    ) -> Fitting:
        """A saved state, once all that can be checked has been; nothing is changed yet.

        Args:
            items: what `read_state` returned.
            where: the checkpoint, for messages.
            only: items to put; None is all, and every saved one must have its object.
            elsewhere: `names` that other ranks have, and this one need not.

        Raises:
            CheckpointMismatchError: an item is missing or does not fit.
        """
        objects = dict(self._objects)
        if only is not None:
            only = with_every_optimizer(only, objects)
            if unknown := sorted(only - objects.keys()):
                raise CheckpointMismatchError(
                    f"there is no {', '.join(unknown)} in this run; it has {', '.join(objects)}"
                )
            objects = {name: item for name, item in objects.items() if name in only}
        objects = {n: x for n, x in objects.items() if n in items or n not in _LATER}
        names = ParameterNames(self.objects)
        if any(is_by_name(state) for state in items.values()) or self._ranked:
            # saved by ranks, or here are some: what wraps the model may be another there
            items = renamed(items, self._model)
        for name, item in objects.items():
            if isinstance(item, torch.optim.Optimizer) and is_by_name(items.get(name)):
                others = {n.partition("/")[2] for n in elsewhere if n.startswith(f"{name}/")}
                number = by_number(name, item, names, items[name], others, where)
                items = {**items, name: number}
            elif isinstance(item, nn.Module) and elsewhere and name in items:
                here = {k: v for k, v in items[name].items() if f"{name}/{k}" not in elsewhere}
                items = {**items, name: OrderedDict(here)}
        doubted = self._check(objects, items, where, everything=only is None)
        notes = setting_notes(objects, items)
        return Fitting(items, objects, only is None, doubted, notes)

    def put(self, fitting: Fitting, saved_versions: dict[str, str]) -> Put:
        """Puts a state back.

        Raises:
            Exception: whatever an object raises. After any error all are as they were.
        """
        items, objects = fitting.items, fitting.objects
        for name, metadata in items["module-versions"].items():
            if name in objects:
                items[name]._metadata = metadata
        undo: list[Callable[[], None]] = []
        try:
            # what may raise on its own comes before what was checked and is not copied first
            for name in sorted(objects, key=lambda n: (cannot_fail(objects[n]), n)):
                undo.append(put_state(objects[name], items[name]))
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        if not fitting.whole:
            return Put((), "", ())
        doubted = fitting.doubted
        doubted += self._left_out.put(items.get("left-out"))
        plan = put_all_plans(
            self.objects, items["plans"], items.get("inner-plans"), self.optimizers
        )
        inexact = version_differences(saved_versions, versions())
        if lost := lost_random_states(items["random"]):
            inexact.append(lost)
        inexact += doubted
        inexact += other_functions(self.objects, items.get("functions"))
        return Put(tuple(inexact), plan, (*self._config_notes(items["config"]), *fitting.notes))

    def _check(
        self, objects: dict[str, Stateful], items: dict[str, Any], where: str, *, everything: bool
    ) -> list[str]:
        """What cannot be told of items that fit.

        Raises:
            CheckpointMismatchError: they do not.
        """
        if missing := [name for name in objects if name not in items]:
            raise CheckpointMismatchError(
                f"{where} was saved without {', '.join(missing)}: leave them out of the "
                "Checkpointer, or restore with only=. Nothing was changed"
            )
        extra = [name for name in items if name not in {*objects, *OWN}]
        if everything and extra:
            raise CheckpointMismatchError(
                f"{where} holds {', '.join(extra)}, for which the Checkpointer was given no "
                "object: pass them, or restore with only=. Nothing was changed"
            )
        identities, saved = self._identities(), items["identities"]
        found: list[str] = []
        for name, item in objects.items():
            if name in identities:
                check_identity(name, identities[name], saved[name], where)
                found += doubts(name, identities[name], saved[name])
            check_fits(name, item, items[name], where)
        return found

    def _identities(self) -> dict[str, Any]:
        """Of all but modules, whose tensors have names."""
        names = ParameterNames(self.objects)
        found = {
            name: identity_of(item, names)
            for name, item in self._objects.items()
            if not isinstance(item, nn.Module)
        }
        if self._ranked:
            for identity in found.values():
                identity.pop("parameters", None)  # whose state is by name
        return found

    def _config_notes(self, saved: Mapping[str, Any]) -> list[str]:
        keys = dict.fromkeys([*saved, *self._config])
        return [
            f"config {key} was {saved.get(key)!r:.60}, is {self._config.get(key)!r:.60}"
            for key in keys
            if repr(saved.get(key)) != repr(self._config.get(key))
        ]
