"""Sees which backwards a user's step runs over the graph of a forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from actckpt.rewriting.backward import backward_id, keeps_graph
from actckpt.tracing.backwards import Backward
from actckpt.tracing.call import tensors

Learn = Callable[[tuple[Backward, ...]], None]


class BackwardWatch:
    """A hook on what a forward returned: called in every backward that comes through.

    Autograd keeps it as long as the graph; it holds nothing itself. A single backward that keeps no
    graph tells it nothing, nor do several over parts that have nothing in common.
    """

    __slots__ = ("_batch", "_ids", "_learn", "_model", "_seen")

    def __init__(self, model: nn.Module, batch: list[torch.Tensor], learn: Learn) -> None:
        """
        Args:
            batch: what the forward was given and wants gradients.
            learn: a bound method, held weakly; told of the backwards so far at each further one.
        """
        self._model = weakref.ref(model)
        self._batch = [weakref.ref(t) for t in batch]
        self._learn: Any = weakref.WeakMethod(learn)
        self._ids: list[int] = []
        self._seen: list[Backward] = []

    def __call__(self, _: Any) -> None:
        number = backward_id()
        if number in self._ids:
            return
        self._ids.append(number)
        if not self._seen and not keeps_graph():
            return
        learn, model = self._learn(), self._model()
        if learn is not None and model is not None:
            self._seen.append(self._describe(model))
            learn(tuple(self._seen))

    def _describe(self, model: nn.Module) -> Backward:
        """The backward that is running."""
        returned = []
        into_grad = False
        for name, p in model.named_parameters():
            if p.requires_grad:
                found = _gets(p)
                into_grad = into_grad or found is True
                if found is None:
                    returned.append(name)
        batch = (ref() for ref in self._batch)
        return Backward(
            keeps=keeps_graph(),
            second_order=torch.is_grad_enabled(),
            into_grad=into_grad,
            returned=tuple(returned),
            batch=any(t is not None and _gets(t) is None for t in batch),
        )


def _gets(tensor: torch.Tensor) -> bool | None:
    """Whether the running backward adds to a tensor's ``.grad``; None if it returns the gradient.

    Of a tensor that was computed the two cannot be told apart: its gradient is returned.
    """
    if not tensor.is_leaf:
        return None
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(tensor).node))
    except RuntimeError:
        return None


def watch_backwards(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, learn: Learn
) -> None:
    """Tells ``learn`` of the backwards over a forward's graph, if there is more than one."""
    nodes = [t.grad_fn for t in tensors(output) if t.grad_fn is not None]
    if nodes:
        batch = [t for t in tensors((args, kwargs)) if t.requires_grad]
        found = BackwardWatch(model, batch, learn)
        for node in nodes:
            node.register_prehook(found)
