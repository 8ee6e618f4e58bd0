"""What a plan depends on besides the model: by it a batch keeps a plan or gets another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from actckpt.rewriting.ambient import autocast_state
from actckpt.session.model_contents import Contents
from actckpt.tracing.parametrized import count_cached, is_caching
from actckpt.tracing.parts import ragged
from actckpt.tracing.signature import SPARSE

# in C: every forward asks for thousands of them
_training, _requires_grad, _dtype = map(attrgetter, ("training", "requires_grad", "dtype"))


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The arguments' structure, the tensors' shapes, and the model's and autocast's state."""

    structure: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    state: tuple[Any, ...]

    def covers(self, other: BatchKey) -> bool:
        """Whether a plan made for this key bounds a step of ``other``: no dimension is larger."""
        return (
            self.structure == other.structure
            and self.state == other.state
            and all(
                len(a) == len(b) and all(y <= x for x, y in zip(a, b, strict=True))
                for a, b in zip(self.shapes, other.shapes, strict=True)
            )
        )

    @property
    def elements(self) -> int:
        """How many elements the batch has."""
        return sum(map(math.prod, self.shapes))

    def difference(self, other: BatchKey) -> str:
        """What of ``other`` a plan made for this key was not made for; "" where it covers it."""
        (cast, training, trained, dtypes, cached), now = self.state, other.state
        if self.structure != other.structure:
            return f"called with {_listed(other.structure)}, not {_listed(self.structure)}"
        if cast != now[0]:
            return f"autocast is {_autocast(now[0])}, not {_autocast(cast)}"
        if training != now[1]:
            return (
                f"{sum(now[1])} of {len(now[1])} modules are in training mode, not {sum(training)}"
            )
        if trained != now[2]:
            return f"{sum(now[2])} of {len(now[2])} parameters are trained, not {sum(trained)}"
        if dtypes != now[3]:
            return "the parameters are of other dtypes"
        if cached != now[4]:
            return (
                f"torch.nn.utils.parametrize caches {now[4]} tensors, not {cached} (-1: it is off)"
            )
        if self.covers(other):
            return ""
        pairs = zip(self.shapes, other.shapes, strict=True)
        planned, found = next((a, b) for a, b in pairs if a != b)
        return f"a tensor is {found}, not {planned}"


class Arguments(NamedTuple):
    """What a forward is called with: the nesting of it, the tensors in it, and their shapes."""

    structure: list[Any]
    shapes: list[tuple[int, ...]]
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Those of one call."""
        found = cls([], [], [])
        found._take((args, kwargs))
        return found

    def _take(self, x: Any) -> None:
        if isinstance(x, torch.Tensor):
            self.tensors.append(x)
            self.structure.append((x.dtype, str(x.device), x.requires_grad))
            try:
                self.shapes.append(tuple(x.shape))
            except RuntimeError as error:  # a nested tensor of strided ones has no shape
                raise ragged("one is an argument") from error
            if x.layout in SPARSE:
                self.shapes.append((x._nnz(),))
        elif isinstance(x, Mapping):
            self.structure.append((type(x), tuple(x)))
            for value in x.values():
                self._take(value)
        elif isinstance(x, (list, tuple)):
            self.structure.append((type(x), len(x)))
            for value in x:
                self._take(value)
        elif is_dataclass(x) and not isinstance(x, type):
            self.structure.append(type(x))
            for f in fields(x):
                self._take(getattr(x, f.name, None))
        elif x is None or isinstance(x, (bool, int, float, str)):
            self.structure.append(x)
        else:
            self.structure.append(type(x))


def batch_key(found: Contents, arguments: Arguments) -> BatchKey:
    """The key of one forward call of a model as things are now."""
    modules, parameters = found
    device = parameters[0].device.type if parameters else "cpu"
    state = (
        autocast_state(device),
        tuple(map(_training, modules)),
        tuple(map(_requires_grad, parameters)),
        tuple(map(_dtype, parameters)),
        count_cached(modules) if is_caching() else -1,
    )
    return BatchKey(tuple(arguments.structure), tuple(arguments.shapes), state)


def _listed(structure: tuple[Any, ...]) -> str:
    """Arguments in words, as `Arguments` has written them down."""
    words = []
    for item in structure[1:]:
        if isinstance(item, tuple) and isinstance(item[0], torch.dtype):
            words.append(str(item[0]).removeprefix("torch."))
        elif isinstance(item, tuple) and isinstance(item[0], type):
            inside = item[1] if isinstance(item[1], int) else "/".join(map(str, item[1]))
            words.append(f"{item[0].__name__}({inside})")
        else:
            words.append(getattr(item, "__name__", repr(item)))
    return " ".join(words)


def _autocast(state: tuple[tuple[str, bool, torch.dtype], ...]) -> str:
    """Where autocast is on."""
    on = [f"{dtype} on {device}".removeprefix("torch.") for device, is_on, dtype in state if is_on]
    return ", ".join(on) or "off"
