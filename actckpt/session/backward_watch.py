"""Sees which backwards a user's step runs over the graph of a forward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from actckpt.rewriting.backward import backward_id, keeps_graph
from actckpt.tracing.backwards import Backward, joined
from actckpt.tracing.call import tensors


class Learner(Protocol):
    """Who is told which backwards a step runs."""

    def learn_backwards(
        self, found: tuple[Backward, ...], planned: tuple[Backward, ...]
    ) -> None: ...


class Seen:
    """The backwards that ran over the graphs of one forward of a step, or of the like of it."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: tuple[Backward, ...] = ()

    def learn(self, found: tuple[Backward, ...]) -> None:
        """Another step ran these."""
        self.found = joined(self.found, found)


class BackwardWatch:
    """A hook on what a forward returned: called in every backward that comes through.

    Autograd keeps it as long as the graph; it holds nothing itself. A single backward that keeps no
    graph tells it nothing, nor do several over parts that have nothing in common.

    Attributes:
        done: whether a backward has come to it that does not keep the graph.
    """

    __slots__ = (
        "__weakref__", "_batch", "_first", "_ids", "_learner", "_model", "_noted", "_planned",
        "_seen", "_spread", "done",
    )  # fmt: skip

    def __init__(
        self,
        model: weakref.ref[nn.Module],
        batch: Sequence[weakref.ref[torch.Tensor]],
        learner: Learner | None,
        noted: Seen,
        planned: tuple[Backward, ...],
        first: int,
    ) -> None:
        """
        Args:
            batch: what the forward was given.
            learner: held weakly; told of the backwards so far at each further one. None where
                nobody wants to know.
            noted: is told the same.
            planned: what the forward's plan was made for.
            first: number of the first node that the forward has added to the graph.
        """
        self.done = False
        self._model = model
        self._batch = batch
        self._learner = None if learner is None else weakref.ref(learner)
        self._noted = noted
        self._planned = planned
        self._first = first
        self._ids: list[int] = []
        self._seen: list[Backward] = []
        # numbers of the nodes that keep it
        self._spread: set[int] = set()

    def __call__(self, _: Any) -> None:
        keeps = keeps_graph()
        if not keeps:
            self.done = True
        elif torch.is_grad_enabled():
            node = torch._C._current_autograd_node()
            if node is not None:
                self._spread_from(node)
        if self._learner is None:
            return
        number = backward_id()
        if number in self._ids:
            return
        self._ids.append(number)
        if not self._seen and not keeps:
            return
        learner, model = self._learner(), self._model()
        if learner is not None and model is not None:
            self._seen.append(self._describe(model))
            found = tuple(self._seen)
            self._noted.learn(found)
            learner.learn_backwards(found, self._planned)

    def _spread_from(self, node: Any) -> None:
        """Lets every node of the forward keep it, and tell it of a backward that ends the graph.

        What gradients are computed from (``create_graph``) holds those nodes, but not the one that
        made the output, nor need a backward through it come there.
        """
        todo = [node]
        while todo:
            for further, _ in todo.pop().next_functions:
                if further is None or hasattr(further, "variable"):
                    continue  # a parameter, whose node is that of every forward
                number = further._sequence_nr()
                if number >= self._first and number not in self._spread:
                    self._spread.add(number)
                    todo.append(further)
                    further.register_prehook(_Ends(self))

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
            batch=any(t is not None and t.requires_grad and _gets(t) is None for t in batch),
        )


class _Ends:
    """A hook on a node inside the graph of a forward that gradients are computed from."""

    __slots__ = ("_watch",)

    def __init__(self, watch: BackwardWatch) -> None:
        self._watch = watch

    def __call__(self, _: Any) -> None:
        if not keeps_graph():
            self._watch.done = True


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
    output: Any,
    model: weakref.ref[nn.Module],
    batch: Sequence[weakref.ref[torch.Tensor]],
    learner: Learner | None,
    noted: Seen,
    planned: tuple[Backward, ...],
    first: int,
) -> BackwardWatch | None:
    """Tells ``learner`` of the backwards over a forward's graph, if there is more than one.

    Args:
        noted: is told the same.
        planned: what the forward's plan was made for.
        first: number of the first node that the forward has added to the graph.

    Returns:
        What lives as long as the graph; None where there is none.
    """
    if isinstance(output, torch.Tensor):
        node = output.grad_fn
        nodes = [] if node is None else [node]
    else:
        nodes = list({t.grad_fn: None for t in tensors(output) if t.grad_fn is not None})
    if not nodes:
        return None
    found = BackwardWatch(model, batch, learner, noted, planned, first)
    for node in nodes:
        node.register_prehook(found)
    return found
