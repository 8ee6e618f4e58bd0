"""The dispatch mode under which a step runs on fake tensors: what tracer and dry run share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.tracing.fake import FakeWorld
from actckpt.tracing.guards import ASKING, note_question
from actckpt.tracing.kernel_outputs import fake_outputs
from actckpt.tracing.new_fakes import NewFakes
from actckpt.tracing.parts import is_shell_type, with_parts
from actckpt.tracing.real_values import propagate, scalar
from actckpt.tracing.repeated import REPEATED, Key
from actckpt.tracing.value_shapes import known_results

aten = torch.ops.aten

_DEVICE = torch.ops.prim.device.default
# bookkeeping of autograd and of Python, not work of the step
SKIPPED = {
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    _DEVICE,
    aten.sym_size.default,
    aten.sym_stride.default,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
    aten.is_same_size.default,
    aten._local_scalar_dense.default,
}


def flat_tensors(args: Any) -> Iterator[torch.Tensor]:
    """Tensors among an operation's arguments or results, lists opened."""
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from flat_tensors(a)


def flat_outputs(out: Any) -> Iterator[torch.Tensor]:
    """Tensors that an operation returned."""
    return flat_tensors(out if isinstance(out, (list, tuple)) else (out,))


class StepMode(TorchDispatchMode):
    """Sits above `FakeTensorMode`; answers for small values, makes real tensors fake on sight.

    Subclasses see each operation of the step in `seen`, and each real tensor that came from nowhere
    (closed over, or in a plain attribute) in `constant`.
    """

    def __init__(self, world: FakeWorld) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world = world
        self.fakes = NewFakes(world.mode)
        self.paused = False
        self.shaped_by_values = False
        # of the operation that runs
        self._key: Key | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps `__torch_dispatch__` against Dynamo, at every operation.

        No frame of Dynamo's is open while a step runs on fakes: compiled functions run as written.
        """
        return False

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operation has run."""
        raise NotImplementedError

    def constant(self, fake: torch.Tensor) -> None:
        """A real tensor was met, and is ``fake`` from now on."""
        raise NotImplementedError

    def asked(self, tensor: torch.Tensor) -> None:
        """Python reads the number in a tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].device  # most of what autograd asks
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(map(is_shell_type, types)):
            return NotImplemented  # its own dispatch calls what the kernels are given
        if func is aten._local_scalar_dense.default:
            found = scalar(args[0])
            if found is None and args[0].dtype is torch.bool and isinstance(args[0], FakeTensor):
                found = self.world.guards.answer(args[0])
            if found is not None:
                self.asked(args[0])
                return found
        accelerated = self.world.stand_in is not None
        key = REPEATED.key(func, args, kwargs, accelerated)
        if key is None and not all(isinstance(t, FakeTensor) for t in flat_tensors(args)):
            args = tuple(self._on_sight(a) for a in args)
            key = REPEATED.key(func, args, kwargs, accelerated)
        self._key = key
        try:
            out = self._outputs(key, func, args, kwargs, accelerated)
        except (DynamicOutputShapeException, DataDependentOutputException):
            # of labels and masks the values may be known
            found = known_results(func, args, kwargs)
            if found is None and func in ASKING:
                return self.world.guards.answer(None)
            if found is None:
                raise
            out, self.shaped_by_values = found, True
        if func in (aten.detach.default, aten.alias.default):
            propagate(func, args, kwargs, out)
        if func in SKIPPED or func.namespace in ("prim", "profiler"):
            return out
        self.seen(func, args, kwargs, out)
        propagate(func, args, kwargs, out)
        note_question(func, out)
        return out

    def _outputs(
        self,
        key: Key | None,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        accelerated: bool,
    ) -> Any:
        if key is not None:
            known, out = REPEATED.results(key, self.fakes, args)
            if known:
                return out
        out = with_parts(args, fake_outputs(func, args, kwargs, accelerated=accelerated))
        if key is not None:
            REPEATED.learn(key, args, kwargs, out)
        return out

    def signature(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The line by which the profile knows the operation that was `seen` last."""
        return REPEATED.signature(self._key, func, args, kwargs)

    def _on_sight(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor):
            fake = self.world.fake(x)
            self.paused = True
            try:
                self.constant(fake)
            finally:
                self.paused = False
            return fake
        if isinstance(x, (list, tuple)):
            return type(x)(self._on_sight(i) for i in x)
        return x
