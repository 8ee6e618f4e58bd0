"""Random generators that a run draws from beside the global ones, found where they are held."""

from __future__ import annotations

import random
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actckpt.checkpoint.encoding import encode
from actckpt.errors import CheckpointSaveError
from actckpt.own_generators import kind_of, put_state, source_of, state_of
from actckpt.resuming.loaders import seeds_itself
from actckpt.resuming.reachable import MOST, is_of_a_library, reachable

# what is looked at in a millisecond or two
_NEAREST, _FIRST = 2_000, 16


@dataclass(frozen=True, slots=True)
class Generators:
    """The generators that some objects lead to.

    Args:
        by_path: each once, by how it is reached; the same path in every process.
        unsaved: what of those has a place in its numbers that nobody can save, in words.
    """

    by_path: Mapping[str, Any]
    unsaved: tuple[str, ...] = ()

    def states(self) -> dict[str, Any]:
        """Of each, by its path."""
        return {path: state_of(g) for path, g in self.by_path.items()}

    def put(self, states: Mapping[str, Any]) -> None:
        """Puts back what `states` gave, where there still is such a generator."""
        for path, state in states.items():
            generator = self.by_path.get(path)
            if generator is not None and kind_of(generator) == state["kind"]:
                put_state(generator, state["state"])

    def without_place(self, states: Mapping[str, Any]) -> list[str]:
        """The paths of states that `put` leaves out."""
        kinds = {path: kind_of(g) for path, g in self.by_path.items()}
        return [path for path, state in states.items() if kinds.get(path) != state["kind"]]


def generators_of(
    roots: Mapping[str, Any], besides: Iterable[int] = (), *, nearest: bool = False
) -> Generators:
    """The generators that these objects lead to; not the global ones, which are saved anyway.

    Args:
        besides: ids of some to leave out.
        nearest: only those near the roots, and among the first entries of lists and dicts.
    """
    near = reachable(roots, _NEAREST, _FIRST) if nearest else reachable(roots)
    found: dict[str, Any] = {}
    unsaved: list[str] = []
    known = {*_global_ones(), *besides}
    count = 0
    for path, x in near:
        count += 1
        if isinstance(x, types.GeneratorType):
            if x.gi_frame is not None and not is_of_a_library(x.gi_code):
                unsaved.append(f"{path} is a Python generator, whose place cannot be saved")
            continue
        if not kind_of(x):
            continue
        source = source_of(x)
        if id(source) in known:
            continue
        known.add(id(source))
        if reason := _why_not(path, x):
            unsaved.append(reason)
        else:
            found[path] = source
    if count >= MOST:
        unsaved.append(
            f"what the run was given leads to more than {MOST:,} objects; generators farther away "
            "were not looked for"
        )
    return Generators(found, tuple(unsaved))


def is_generator(x: Any) -> bool:
    """Whether it is one whose state can be asked for."""
    return bool(kind_of(x))


class RunGenerators:
    """Those that a run's objects and its loader lead to, as an item of a checkpoint and back.

    Args:
        objects: what the run was given beside its loader.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects

    def item(self, loader: Any, *, reading: bool) -> dict[str, Any]:
        """Their states as they are now, and what cannot be saved.

        Args:
            reading: workers, if there are any, have copies from which they have drawn.
        """
        mine, theirs = self._found(loader)
        unsaved = [*mine.unsaved, *theirs.unsaved]
        if reading:
            unsaved += [
                f"{path} draws in the loader's workers, whose copies cannot be saved"
                for path in _in_workers(loader)
            ]
        return {"objects": mine.states(), "loader": theirs.states(), "unsaved": unsaved}

    def put(self, item: Mapping[str, Any], loader: Any, *, objects_only: bool = False) -> None:
        """Puts back what `item` gave."""
        mine, theirs = self._found(loader)
        mine.put(item["objects"])
        if not objects_only:
            theirs.put(item["loader"])

    def inexact(self, item: Mapping[str, Any] | None, loader: Any) -> list[str]:
        """Why these generators may go on from another place than those that were saved.

        Args:
            item: None where the checkpoint is of a version that saved none.
            loader: None where it is not known yet.
        """
        mine, theirs = self._found(loader)
        saved = item or {"objects": {}, "loader": {}, "unsaved": []}
        reasons = [*saved["unsaved"], *mine.unsaved, *theirs.unsaved]
        groups = [(mine, saved["objects"])]
        if loader is not None:
            groups.append((theirs, saved["loader"]))
        for here, states in groups:
            lost = here.without_place(states)
            if here is theirs and seeds_itself(loader):
                lost = [path for path in lost if not path.endswith("sampler.generator")]
            reasons += [f"the generator {path} that was saved is not here" for path in lost]
            reasons += [
                f"the state of the generator {path} was not saved"
                for path, x in here.by_path.items()
                # the place in the data has had those since the first version
                if path not in states and (item is not None or not isinstance(x, torch.Generator))
            ]
        return list(dict.fromkeys(reasons))

    def _found(self, loader: Any) -> tuple[Generators, Generators]:
        mine = generators_of(self._objects)
        known = {id(g) for g in mine.by_path.values()}
        theirs = generators_of({"loader": loader}, known)
        return mine, theirs


def _in_workers(loader: Any) -> list[str]:
    """The paths of generators that a loader's workers have copies of."""
    if not getattr(loader, "num_workers", 0):
        return []
    names = ("dataset", "collate_fn", "worker_init_fn")
    return list(generators_of({f"loader.{n}": getattr(loader, n, None) for n in names}).by_path)


def _global_ones() -> set[int]:
    own = getattr(np.random.mtrand, "_rand", None)
    found: Iterable[Any] = [
        getattr(random, "_inst", None),
        own,
        getattr(own, "_bit_generator", None),
        torch.default_generator,
        *torch.cuda.default_generators,
    ]
    return {id(x) for x in found if x is not None}


def _why_not(path: str, x: Any) -> str:
    """Why the state of a generator cannot be saved; "" if it can."""
    if isinstance(x, random.SystemRandom):
        return f"{path} draws from the operating system"
    if "{}" in path:
        return f"{path} is in a set, which has no order to find it by again"
    try:
        encode(state_of(source_of(x)), path)
    except (CheckpointSaveError, NotImplementedError, TypeError, AttributeError) as error:
        return f"the state of {path} cannot be saved: {error!s:.200}"
    return ""
