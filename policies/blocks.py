"""Candidate stages: the calls that are worth recomputing as a whole, and the chains they form."""

from __future__ import annotations

from actckpt.data.graph import Graph
from actckpt.data.plan import Region
from actckpt.interpreting.regions import is_linked

OPENED_SHARE = 0.25
REPEATED = 3


def saved_bytes(graph: Graph, stage: int) -> int:
    """Bytes of the activations that are made and saved for backward inside a stage."""
    s = graph.stages[stage]
    storages = set()
    for save in graph.saves[s.first_save : s.last_save]:
        sid = graph.values[save.value].storage
        if not save.held and graph.storages[sid].born >= s.first:
            storages.add(sid)
    return sum(graph.storages[sid].bytes for sid in storages)


def may_recompute(graph: Graph, stage: int) -> bool:
    """Whether a region may consist of this stage."""
    s = graph.stages[stage]
    return not s.refusal and not s.mutates


def blocks(graph: Graph) -> tuple[int, ...]:
    """Ids of the candidate stages in forward order, disjoint.

    From the root down, a call is opened while it owns more than a quarter of the saved bytes and
    its children own most of that, unless it is one of three or more siblings of the same class.
    """
    total = saved_bytes(graph, 0)
    children = graph.children

    def visit(stage: int) -> list[int]:
        own = saved_bytes(graph, stage)
        if own == 0:
            return []
        inner = sum(saved_bytes(graph, c) for c in children[stage])
        s = graph.stages[stage]
        if not may_recompute(graph, stage):
            return inside(stage)
        siblings = children[s.parent] if s.parent >= 0 else ()
        repeated = sum(graph.stages[i].kind == s.kind for i in siblings) >= REPEATED
        if 2 * inner > own and not repeated and (own > OPENED_SHARE * total or s.parent < 0):
            return inside(stage)
        return [stage]

    def inside(stage: int) -> list[int]:
        return [found for child in children[stage] for found in visit(child)]

    return tuple(visit(0))


def opened(graph: Graph, stage: int) -> tuple[int, ...]:
    """The calls inside a stage that save something and may be recomputed: one level down.

    A call whose only content is another call (a wrapper) is passed through.
    """
    children = graph.children
    found: list[int] = []
    for child in children[stage]:
        if saved_bytes(graph, child) == 0:
            continue
        if may_recompute(graph, child):
            found.append(child)
        else:
            found.extend(opened(graph, child))
    return tuple(found)


def chains(graph: Graph, stages: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """``stages`` cut into maximal runs that one region may span.

    Stages between two of them that save nothing belong to the run if they link it.
    """
    runs: list[list[int]] = []
    children = graph.children
    for stage in stages:
        if runs:
            last = runs[-1][-1]
            parent = graph.stages[stage].parent
            if graph.stages[last].parent == parent:
                siblings = children[parent]
                whole = list(runs[-1])
                for candidate in siblings[siblings.index(last) + 1 : siblings.index(stage) + 1]:
                    if not may_recompute(graph, candidate) or not is_linked(
                        graph, tuple(whole), candidate
                    ):
                        break
                    whole.append(candidate)
                else:
                    runs[-1] = whole
                    continue
        runs.append([stage])
    return tuple(tuple(r) for r in runs)


def region(graph: Graph, first: int, last: int | None = None, *inside: Region) -> Region:
    """The region of the stages from ``first`` to ``last``."""
    last = first if last is None else last
    return Region(graph.stages[first].key, graph.stages[last].key, tuple(inside))
