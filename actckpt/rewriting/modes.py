"""Dispatch modes of a region: capture results in the forward pass, skip operations in a replay."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.rewriting.holders import Kept, is_parameter
from actckpt.rewriting.node import Node
from actckpt.rewriting.pruning import Pruning, Skipped, placeholder, window
from actckpt.tracing.mode import SKIPPED, flat_outputs, flat_tensors
from actckpt.tracing.signature import overload


class Mismatch(Exception):
    """The operations are not those that were traced: nothing may be skipped."""


@cache
def _overload(name: str) -> Any:
    return overload(name)


class _Following(TorchDispatchMode):
    """Follows the traced operations by name and by the shape of the first tensor argument."""

    def __init__(self, pruning: Pruning) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pruning = pruning
        self.position = 0

    def matches(self, func: Any, args: Any, kwargs: Any) -> bool | None:
        """Whether ``func`` is the next traced operation; None if it does not count."""
        if func in SKIPPED or func.namespace in ("prim", "profiler"):
            return None
        if self.position >= len(self.pruning.names):
            return None  # past the early stop of the traced replay
        expected = _overload(self.pruning.names[self.position])
        first = next(flat_tensors((*args, *kwargs.values())), None)
        shape = None if first is None else tuple(first.shape)
        if func is expected and shape == self.pruning.shapes[self.position]:
            return True
        # autocast casts a weight once per context, and a replay may be in another one
        if func is torch.ops.aten._to_copy.default and is_parameter(args[0]):
            return None
        return False


class CaptureMode(_Following):
    """Keeps the results of the operations that the plan saves though autograd does not."""

    def __init__(self, node: Node, position: int) -> None:
        assert node.program.pruning is not None
        super().__init__(node.program.pruning)
        self.node = node
        self.position = 0 if position == node.begin else node.captured_to

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.node.prunable:
            return out
        matched = self.matches(func, args, kwargs)
        if matched is False:
            self.node.prunable = False
            self.node.kept.clear()
        elif matched:
            if self.position in self.pruning.captured:
                for n, t in enumerate(flat_outputs(out)):
                    self.node.kept[(self.position, n)] = Kept(t)
            self.position += 1
            self.node.captured_to = self.position
        return out


class PruneMode(_Following):
    """Skips what nobody needs.

    Raises:
        Mismatch: from within the forward, when an operation is not the traced one.
    """

    def __init__(self, node: Node) -> None:
        assert node.program.pruning is not None
        super().__init__(node.program.pruning)
        self.node = node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        matched = self.matches(func, args, kwargs)
        if matched is None:
            return func(*args, **kwargs)
        if not matched:
            raise Mismatch
        action = self.pruning.actions[self.position]
        self.position += 1
        if action is None:
            return func(*args, **kwargs)
        if not _same_shapes(args, kwargs, action.inputs):
            raise Mismatch
        if action.in_place:
            return args[0]
        outputs = [self._output(action, n) for n in range(len(action.outputs))]
        return outputs[0] if action.single else tuple(outputs)

    def _output(self, action: Skipped, n: int) -> torch.Tensor:
        source, meta = action.sources[n], action.outputs[n]
        if source is None:
            return placeholder(meta)
        kept = self.node.kept.get(source.key)
        # changed in place since, perhaps after the region; or laid out otherwise than traced
        if kept is None or kept.is_changed() or window(kept.tensor) != source.window:
            raise Mismatch
        shape, stride, offset, _, _ = meta
        return kept.tensor.detach().as_strided(shape, stride, offset)


def _same_shapes(args: Any, kwargs: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    found = (*flat_tensors(args), *flat_tensors(kwargs.values()))
    return len(found) == len(shapes) and all(
        t.shape == s for t, s in zip(found, shapes, strict=True)
    )
