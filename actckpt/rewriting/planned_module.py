"""A module that a plan names, as the runs of that plan know it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from actckpt.rewriting.program import StageProgram
from actckpt.rewriting.rewrite import Rewrite
from actckpt.tracing.forwards import FORWARD, Replaced
from actckpt.tracing.parametrized import Entries, cached_of, is_caching


class _Table(NamedTuple):
    """Where one module keeps its own parameters and buffers: the very dictionaries."""

    path: str
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]


class PlannedModule(Replaced):
    """What a run reads of a module: its tensors, its flags, and the forward underneath."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        rewrite: Rewrite,
        original: Callable[..., Any] | None,
        name: str = FORWARD,
    ) -> None:
        super().__init__(module, original, name)
        self.path = path
        self.rewrite = rewrite
        self._tables: list[_Table] | None = None
        self._inside: list[weakref.ref[nn.Module]] | None = None

    @property
    def device_type(self) -> str:
        return self.rewrite.device_type

    def is_meant(self) -> bool:
        """Whether its plan's model exists and has this module where the plan says."""
        root = self.rewrite.root()
        try:
            return root is not None and root.get_submodule(self.path) is self.module
        except AttributeError:
            return False

    def places(self, program: StageProgram) -> list[tuple[dict[str, Any], str]]:
        """Where the parameters and buffers are that the forward reads and does not change."""
        if self._tables is None:
            self._tables = [
                _Table(path, m._parameters, m._buffers)
                for path, m in self.module.named_modules(prefix=self.path)
                if m._parameters or m._buffers
            ]
        changed = {*program.touches, *((path, name) for path, name, _ in program.buffers)}
        found: list[tuple[dict[str, Any], str]] = [
            (table.parameters, name)
            for table in self._tables
            for name, p in table.parameters.items()
            if p is not None
        ]
        found += [
            (table.buffers, name)
            for table in self._tables
            for name, b in table.buffers.items()
            if b is not None and (table.path, name) not in changed
        ]
        return found

    def watched(self, program: StageProgram) -> list[tuple[torch.Tensor, int]]:
        """What is in those `places`, with versions.

        In the place of what was computed (`torch.func.functional_call`) an alias without its graph.
        """
        found = (table[name] for table, name in self.places(program))
        return [(_leaf(t), t._version) for t in found]

    def cached(self) -> Entries | None:
        """What `parametrize.cached` keeps of the parametrized tensors of the module."""
        return cached_of(self._modules()) if is_caching() else None

    def training(self) -> tuple[bool, ...]:
        """The ``training`` flag of the module and of each module inside it."""
        return tuple(m.training for m in self._modules())

    @contextmanager
    def as_training(self, flags: tuple[bool, ...]) -> Iterator[None]:
        """Puts the flags back for a while: the user may have called ``eval()`` in between."""
        found = self._modules()
        now = [m.training for m in found]
        try:
            for m, flag in zip(found, flags, strict=True):
                if m.training is not flag:
                    m.training = flag
            yield
        finally:
            for m, flag in zip(found, now, strict=True):
                if m.training is not flag:
                    m.training = flag

    def _modules(self) -> list[nn.Module]:
        if self._inside is None:
            self._inside = [weakref.ref(m) for m in self.module.modules()]
        return [m for ref in self._inside if (m := ref()) is not None]

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of a watched tensor, for messages."""
        named = (
            (f"{table.path}.{name}".lstrip("."), t)
            for table in self._tables or ()
            for name, t in (*table.parameters.items(), *table.buffers.items())
        )
        return next((name for name, t in named if t is tensor), "a parameter")


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()
