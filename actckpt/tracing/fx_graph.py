"""The traced step as a `torch.fx.Graph`: for those who know fx, and to run the trace again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from actckpt.data.graph import Graph, Op, Phase
from actckpt.tracing.signature import decode, overload


def fx_graph(graph: Graph) -> fx.Graph:
    """One ``call_function`` node per operation, in the order of execution.

    A placeholder stands for each tensor that no operation made: parameters, buffers, batch and
    constants, by their storage's name where it has one. ``node.meta`` holds "val" (the tensor's
    shape, stride, offset and dtype as a `Value`), and of operations "stage" (module path), "call"
    (its number), "phase", "owner" (the forward node of a backward one) and "signature". The output
    is the loss (None where it was not seen) and the gradients of the parameters that its ``meta``
    lists under "gradients". In-place operations stay in place.

    O(operations + values).
    """
    return _Builder(graph).build()


class _Builder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fx = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}  # value -> node that made it last
        self.made: list[fx.Node] = []

    def build(self) -> fx.Graph:
        self._placeholders()
        for op in self.graph.ops:
            self._operation(op)
        self._output()
        self.fx.lint()
        return self.fx

    def _placeholders(self) -> None:
        """For values that are read before any operation has returned them."""
        returned: set[int] = set()
        wanted: dict[int, None] = {}
        for op in self.graph.ops:
            wanted.update(dict.fromkeys(v for v in op.inputs if v not in returned))
            returned.update(op.outputs)
        for number, value in enumerate(wanted):
            entry = self.graph.values[value]
            storage = self.graph.storages[entry.storage] if entry.storage >= 0 else None
            name = (storage.name if storage is not None else "") or f"input_{number}"
            node = self.fx.placeholder(name.replace(".", "_"))
            node.meta["val"] = entry
            node.meta["name"] = storage.name if storage is not None else ""
            self.nodes[value] = node

    def _operation(self, op: Op) -> None:
        inputs = iter([self.nodes[v] for v in op.inputs])
        signature = self.graph.signatures[op.signature]
        target, args, kwargs = decode(signature, lambda *_: next(inputs))
        node = self.fx.call_function(target, tuple(args), kwargs)
        stage = self.graph.stages[op.stage] if op.stage >= 0 else None
        node.meta |= {
            "stage": stage.path if stage is not None else "",
            "call": stage.call if stage is not None else 0,
            "phase": str(op.phase),
            "owner": self.made[op.owner] if op.owner >= 0 else None,
            "signature": op.signature,
        }
        self.made.append(node)
        self._results(op, node)

    def _results(self, op: Op, node: fx.Node) -> None:
        """Which node stands for each of an operation's results from now on."""
        returns = overload(op.name)._schema.returns
        values = [self.graph.values[v] for v in op.outputs]
        if len(returns) == 1 and str(returns[0].type) == "Tensor":
            node.meta["val"] = values[0] if values else None
            self.nodes.update(dict.fromkeys(op.outputs, node))
            return
        node.meta["val"] = tuple(values)
        for position, value in enumerate(op.outputs):
            item: fx.Node = self.fx.call_function(_item, (node, position))
            item.meta |= {key: v for key, v in node.meta.items() if key != "val"}
            item.meta["val"] = self.graph.values[value]
            self.nodes[value] = item

    def _output(self) -> None:
        graph = self.graph
        settled = {s.name: (i, s.settled) for i, s in enumerate(graph.storages) if s.settled >= 0}
        gradients: dict[str, fx.Node] = {}
        for name, (storage, end) in settled.items():
            for op in reversed(graph.ops[:end]):
                found = [v for v in op.outputs if graph.values[v].storage == storage]
                if found:
                    gradients[name] = self.nodes[found[0]]
                    break
        # backward begins with a tensor of ones like the loss
        begin = next((op for op in graph.ops if op.phase is Phase.BACKWARD), None)
        seen = graph.loss_seen and begin is not None and begin.inputs
        loss = self.nodes[begin.inputs[0]] if begin is not None and seen else None
        node = self.fx.output((loss, *gradients.values()))
        node.meta["gradients"] = tuple(gradients)


def _item(results: Any, position: int) -> torch.Tensor:
    """The ``position``-th tensor that an operation returned, lists opened."""
    tensors = list(_tensors(results))
    return tensors[position]


def _tensors(results: Any) -> Iterator[torch.Tensor]:
    for r in results:
        if isinstance(r, torch.Tensor):
            yield r
        elif isinstance(r, (list, tuple)):
            yield from _tensors(r)
