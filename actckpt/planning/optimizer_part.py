"""What the optimizers' steps add to a dry run, read from the trace instead of run once more.

Recomputation ends with backward: what steps after it does the same under every plan.
"""

from __future__ import annotations

from collections import defaultdict

from actckpt.data.graph import Category, Graph, Phase
from actckpt.profiler.live import LiveMeter
from actckpt.tracing.step import Step


def optimizer_part(graph: Graph, step: Step) -> range | None:
    """The operations of the trace that are the optimizers' steps; None where they must be run.

    That is where one steps inside backward or could not be traced, where the trace has none (a step
    that frees its gradients leaves the next one nothing to do), and where one lets go of memory
    that was there before it.
    """
    if not step.optimizers or any(one.in_backward for one in step.optimizers):
        return None
    if graph.untraced_optimizers:
        return None
    end = len(graph.ops)
    first = next((i for i, op in enumerate(graph.ops) if op.phase is Phase.OPTIMIZER), end)
    if first == end or any(op.phase is not Phase.OPTIMIZER for op in graph.ops[first:]):
        return None
    if any(s.born < first < s.died < end for s in graph.storages):
        return None
    if any(first < save.released < end for save in graph.saves):
        return None
    return range(first, end)


def enter_states(graph: Graph, part: range, live: LiveMeter) -> None:
    """Counts what is there when a step begins and only the operations of the part would show.

    The optimizers' state, and constants that they meet.
    """
    before = {graph.values[v].storage for op in graph.ops[: part.start] for v in op.inputs}
    met = {graph.values[v].storage for op in graph.ops[part.start :] for v in op.inputs} - before
    for sid, s in enumerate(graph.storages):
        own = s.category is Category.CONSTANT and sid in met
        if s.born < 0 and s.bytes and (own or s.category is Category.OPTIMIZER):
            live.occupy(s.bytes, s.category)


class PartMemory:
    """The memory that the operations of a part take and free, in a meter."""

    def __init__(self, graph: Graph, part: range, live: LiveMeter) -> None:
        self._live = live
        self._born: dict[int, list[int]] = defaultdict(list)
        self._died: dict[int, list[int]] = defaultdict(list)
        self._bytes = [s.bytes for s in graph.storages]
        self._categories = [s.category for s in graph.storages]
        self._ids: dict[int, int] = {}
        for sid, s in enumerate(graph.storages):
            if s.born >= part.start and s.bytes and s.died > s.born:
                self._born[s.born].append(sid)
                self._died[s.died].append(sid)

    def ran(self, op: int) -> None:
        """Operation ``op`` has run: what had gone by then, and what it made."""
        for sid in self._died.get(op, ()):
            self._live.vacate(self._ids.pop(sid))
        for sid in self._born.get(op, ()):
            self._ids[sid] = self._live.occupy(self._bytes[sid], self._categories[sid])
