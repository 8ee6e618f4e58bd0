"""Which operation of the trace a dry run is at, and whether it is run again."""

from __future__ import annotations

from dataclasses import dataclass

from actckpt.data.graph import Graph
from actckpt.rewriting.bursting import Decoded
from actckpt.rewriting.current import CURRENT
from actckpt.rewriting.replay import Replay
from actckpt.rewriting.rewrite import Rewrite


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operation stands.

    Attributes:
        op: index in `Graph.ops`; -1 where that is not known.
        again: it is part of a recomputation.
        region: label of the region that is recomputed, "" for bursts and for anything else.
    """

    op: int
    again: bool = False
    region: str = ""


class Course:
    """Follows a dry run through the trace of the same step.

    What is not recomputed runs in the order of the trace; what bursts run is asked of the rewrite's
    decoded steps, one look-up before each; regions say who they are.
    """

    def __init__(self, graph: Graph, rewrite: Rewrite) -> None:
        self._names = [op.name for op in graph.ops]
        self._next = 0
        self._asked = rewrite.decoded = _Asked()

    def at(self, name: str) -> Place:
        """Where the operation of that name stands, which has just run."""
        step = self._asked.op
        if step >= 0 and self._names[step] == name:
            self._asked.op = -1
            return Place(step, again=True)
        if step >= 0:
            return Place(-1, again=True)  # a window on what the step reads
        if isinstance(CURRENT.run, Replay):
            return Place(-1, again=True, region=CURRENT.run.node.program.label)
        if self._next < len(self._names) and self._names[self._next] == name:
            self._next += 1
            return Place(self._next - 1)
        return Place(-1)  # the state of a generator; a second backward over the graph


class _Asked(dict[int, Decoded]):
    """Decoded steps of bursts; keeps the operation of the last that was asked for."""

    op = -1

    def get(self, key: int, default: Decoded | None = None) -> Decoded | None:  # type: ignore[override]
        found = super().get(key, default)
        if found is not None:
            self.op = found.step.op
        return found

    def __setitem__(self, key: int, value: Decoded) -> None:
        super().__setitem__(key, value)
        self.op = value.step.op
