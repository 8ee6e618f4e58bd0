"""What stands in the place of ``forward`` on an instance of a planned module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.rewriting.program import StageProgram
from actckpt.rewriting.rewrite import Rewrite
from actckpt.rewriting.run import CURRENT
from actckpt.tracing.compiled import never_compiled
from actckpt.tracing.fake import is_tracing
from actckpt.tracing.forwards import FORWARD, TAKEN, Replaced, forward_of, replaced
from actckpt.tracing.lightning import TRAINING_STEP, Unseen, unseen_logging
from actckpt.tracing.parametrized import Entries, cached_of, is_caching

# the number of the next node of autograd's graph in this thread
_next_node: Callable[[], int] = torch._C._autograd._get_sequence_nr


class _Table(NamedTuple):
    """Where one module keeps its own parameters and buffers: the very dictionaries."""

    path: str
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]


class PatchedForward(Replaced):
    """Stands in a module's ``__dict__`` as ``forward``; knows its module weakly.

    Weakly, so that a deep copy or an unpickled model runs its own weights.
    """

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

    @property
    def __func__(self) -> Callable[..., Any]:
        """A function of the module and its arguments, as a method has.

        Who wraps that and binds it again (Accelerate) can copy the module: a copy finds its own.
        """
        if self.name != FORWARD:
            raise AttributeError("__func__")
        self.module.__dict__[TAKEN] = self
        return forward_of

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward underneath: `inspect.signature` looks here."""
        if self.original is not None:
            return self.original
        module = self.module
        bound: Callable[..., Any] = getattr(type(module), self.name).__get__(module)
        return bound

    def watched(self, program: StageProgram) -> list[tuple[torch.Tensor, int]]:
        """Parameters and buffers that the forward reads and does not change, with versions."""
        if self._tables is None:
            self._tables = [
                _Table(path, m._parameters, m._buffers)
                for path, m in self.module.named_modules(prefix=self.path)
                if m._parameters or m._buffers
            ]
        changed = {*program.touches, *((path, name) for path, name, _ in program.buffers)}
        found = [
            (p, p._version)
            for table in self._tables
            for p in table.parameters.values()
            if p is not None
        ]
        buffers = [
            (b, b._version)
            for table in self._tables
            for name, b in table.buffers.items()
            if b is not None and (table.path, name) not in changed
        ]
        return [*found, *buffers]

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

    @never_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.instead is not None:
            return self.instead(*args, **kwargs)
        if self.off:
            return self.run(args, kwargs)
        run = CURRENT.run
        if run is not None and (
            run.rewrite is self.rewrite or run.rewrite.root() is self.rewrite.root()
        ):
            return run.call(self, args, kwargs)
        if self.path or not torch.is_grad_enabled():
            return self.run(args, kwargs)
        if self.rewrite.planner is not None and is_tracing():
            return self.run(args, kwargs)  # a model that holds this one is looked at
        return self._root(args, kwargs)

    def _root(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise PlanError(
                "torch.func transforms do not go through a planned model: recomputation needs "
                "autograd's saved-tensor hooks, which they do not have. Call actckpt.revert(model) "
                "first"
            )
        if self.rewrite.planner is not None:
            self.rewrite.planner.before_forward(args, kwargs, self.name)
        # planning may have put another plan, and so another patch, in place
        patched = patch_of(self.module, self.module, self.name) or self
        previous = CURRENT.run
        training = self.name == TRAINING_STEP
        unseen = Unseen()
        quiet = unseen_logging(self.module, unseen) if training else nullcontext()
        rewrite = patched.rewrite
        CURRENT.run = run = rewrite.begin()
        first = _next_node()
        try:
            with quiet:
                output = run.call(patched, args, kwargs)
        finally:
            CURRENT.run = previous
            rewrite.nodes = max(rewrite.nodes, _next_node() - first - unseen.nodes)
        if self.rewrite.planner is not None:
            self.rewrite.planner.after_forward(args, kwargs, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedForward:
        from copy import deepcopy

        module = memo.get(id(self._module()))
        if module is None:
            return self
        rewrite, original = deepcopy(self.rewrite, memo), deepcopy(self.original, memo)
        clone = PatchedForward(module, self.path, rewrite, original, self.name)
        clone.off = self.off
        return clone

    def __reduce__(self) -> Any:
        # earlier pickles name `Rewrite`, too, as of this module: it stays importable here
        return PatchedForward, (
            self._module(), self.path, self.rewrite, self.original, self.name,
        )  # fmt: skip


def patch_of(
    module: nn.Module, root: nn.Module | None = None, name: str = FORWARD
) -> PatchedForward | None:
    """The patch on a module, or under what stands there.

    Args:
        root: only the one of this model's plan: a module may be a part of several models.
        name: the method that it stands for.
    """
    found = (p for p in patches(module, name) if root is None or p.rewrite.root() is root)
    return next(found, None)


def patches(module: nn.Module, name: str = FORWARD) -> Iterator[PatchedForward]:
    """The patches on a module, each on top of the next."""
    found: Any = replaced(module, name)
    while isinstance(found, PatchedForward):
        yield found
        found = found.original
