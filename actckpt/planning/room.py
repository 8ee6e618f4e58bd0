"""What a step shares its budget with: forwards whose graphs are alive at the same time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from actckpt.data.graph import Category, Graph, Phase, Storage
from actckpt.planning.dry_run import DryRun


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of others during a step of one forward.

    Attributes:
        beside_bytes: what they hold until its backward has ended.
        ahead_bytes: what they take beyond that between the end of its forward and its backward, or
            between two backwards over its graph.
    """

    beside_bytes: int = 0
    ahead_bytes: int = 0

    def __bool__(self) -> bool:
        return self.beside_bytes > 0 or self.ahead_bytes > 0

    def of(self, graph: Graph) -> Graph:
        """The graph with that memory in it, as storages that no operation knows."""
        if not self:
            return graph
        phases = [op.phase for op in graph.ops]
        end = phases.index(Phase.OPTIMIZER) if Phase.OPTIMIZER in phases else len(phases)
        turn = _turn(graph)
        beside = Storage(self.beside_bytes, Category.CONSTANT, -1, end)
        ahead = Storage(self.ahead_bytes, Category.ACTIVATION, turn, turn + 1)
        return dataclasses.replace(graph, storages=(*graph.storages, beside, ahead))

    def peak_bytes(self, dry: DryRun, scope: str) -> int:
        """The peak that a scope bounds, with that memory."""
        alone = dry.peak_bytes if scope == "step" else dry.added_bytes
        if not self:
            return alone
        held = max(_level(dry.held, scope), _level(dry.kept, scope))
        turn = held + self.beside_bytes + self.ahead_bytes
        end = dry.starts.get(str(Phase.OPTIMIZER), len(dry.timeline))
        during = max((_level(at, scope) for at in dry.timeline[:end]), default=0)
        return max(alone, during + self.beside_bytes, turn)


NO_OTHERS = Room()


def _level(levels: dict[str, int], scope: str) -> int:
    if scope == "step":
        return sum(levels.values())
    return levels.get(str(Category.ACTIVATION), 0) + levels.get("workspace", 0)


def _turn(graph: Graph) -> int:
    """The first operation after the forward."""
    phases = (op.phase for op in graph.ops)
    return next((n for n, phase in enumerate(phases) if phase is not Phase.FORWARD), len(graph.ops))


def held_untouched_bytes(graph: Graph) -> int:
    """Activations that are alive when the forward has ended, if nothing is recomputed."""
    turn = _turn(graph)
    ends = [s.died for s in graph.storages]
    for save in graph.saves:
        sid = graph.values[save.value].storage
        if sid >= 0:
            ends[sid] = max(ends[sid], save.released)
    return sum(
        s.bytes
        for s, end in zip(graph.storages, ends, strict=True)
        if s.category is Category.ACTIVATION and 0 <= s.born < turn <= end
    )
