"""What stands in the place of ``forward`` on an instance of a planned module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from actckpt.errors import ExportError, PlanError
from actckpt.rewriting.current import CURRENT
from actckpt.rewriting.planned_module import PlannedModule
from actckpt.rewriting.rewrite import Rewrite
from actckpt.rewriting.run import Run
from actckpt.rewriting.scheduled import ScheduledRun
from actckpt.tracing.compiled import never_compiled
from actckpt.tracing.fake import is_tracing
from actckpt.tracing.forwards import FORWARD, TAKEN, forward_of, replaced
from actckpt.tracing.lightning import TRAINING_STEP, Unseen, unseen_logging

# the number of the next node of autograd's graph in this thread
_next_node: Callable[[], int] = torch._C._autograd._get_sequence_nr
_AS_IT_IS = nullcontext()


# that of torch.jit.trace in this thread
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state
# what torch.export and torch.jit.script look at of a forward: its code, as of a function
_OF_FUNCTIONS = ("__code__", "__globals__")
_EXPORTED = (
    "an optimized model can be neither exported (torch.export, torch.onnx) nor scripted or traced "
    "(torch.jit): call actckpt.revert(model) first, and actckpt.optimize again to train on"
)


class PatchedForward(PlannedModule):
    """Stands in a module's ``__dict__`` as ``forward``; knows its module weakly.

    Weakly, so that a deep copy or an unpickled model runs its own weights.
    """

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

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FUNCTIONS:
            raise ExportError(_EXPORTED)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        if self.path:
            return self.run(args, kwargs)
        if _tracing_state() is not None or torch.compiler.is_exporting():
            raise ExportError(_EXPORTED)
        if not torch.is_grad_enabled():
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
        patched, planner = self, self.rewrite.planner
        if planner is not None and planner.before_forward(args, kwargs, self.name):
            # with another plan, there may be another patch in place
            patched = patch_of(self.module, self.module, self.name) or self
        previous = CURRENT.run
        training = self.name == TRAINING_STEP
        unseen = Unseen()
        quiet = unseen_logging(self.module, unseen) if training else _AS_IT_IS
        rewrite = patched.rewrite
        CURRENT.run = run = _begun(rewrite)
        first = _next_node()
        try:
            with quiet:
                output = run.call(patched, args, kwargs)
        finally:
            CURRENT.run = previous
            rewrite.nodes = max(rewrite.nodes, _next_node() - first - unseen.nodes)
        if planner is not None:
            planner.after_forward(output)
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


def _begun(rewrite: Rewrite) -> Run | ScheduledRun:
    """A new forward pass under a plan."""
    rewrite.begin()
    schedule = rewrite.program.schedule
    return Run(rewrite) if schedule is None else ScheduledRun(rewrite, schedule)


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
