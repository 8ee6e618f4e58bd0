"""What makes each storage, and what making it again may need: shared by cuts and bound."""

from __future__ import annotations

from collections.abc import Iterable

from actckpt.data.graph import Graph


class Makers:
    """The operations ``[first, last)`` by the storages that they make.

    Attributes:
        of: storage born in the span -> the operations that make or change it, in order.
    """

    def __init__(self, graph: Graph, first: int, last: int) -> None:
        self.graph = graph
        self.of: dict[int, list[int]] = {}
        for index in range(first, last):
            op = graph.ops[index]
            if op.view:
                continue
            for sid in {graph.values[v].storage for v in op.outputs}.union(op.writes):
                if sid >= 0 and graph.storages[sid].born >= first:
                    self.of.setdefault(sid, []).append(index)

    def inputs(self, index: int) -> set[int]:
        """Storages of the span that an operation reads."""
        found = (self.graph.values[v].storage for v in self.graph.ops[index].inputs)
        return {sid for sid in found if sid in self.of}

    def reachable(self, needed: Iterable[int]) -> tuple[list[int], list[int]]:
        """(storages, operations) that making the needed storages again may read and run."""
        todo = list(needed)
        storages, ops = set(todo), set[int]()
        while todo:
            for index in self.of[todo.pop()]:
                if index not in ops:
                    ops.add(index)
                    fresh = self.inputs(index) - storages
                    storages |= fresh
                    todo.extend(fresh)
        return sorted(storages), sorted(ops)
