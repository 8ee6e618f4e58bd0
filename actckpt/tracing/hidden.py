"""Refuses stages whose recomputation would find something else than their forward found."""

from __future__ import annotations

import dataclasses

from actckpt.data.graph import Category, Graph, Phase, Stage


def hidden_state(graph: Graph) -> Graph:
    """The graph with a ``refusal`` on each stage whose recomputation would read foreign state.

    An argument that is changed in place after the call is gone by the time of the recomputation,
    and autograd has no objection if it did not save it. A tensor that a stage reads, that was made
    outside of it, and that is no argument of it came through an attribute, a closure or a cache: by
    the time of the recomputation it may be another. Weights cast once by autocast are no such
    thing: a recomputation casts them again.
    """
    casts = _autocast_casts(graph)
    last_write = {
        sid: index
        for index, op in enumerate(graph.ops[: graph.forward_end])
        for sid in op.writes
        if graph.storages[sid].category not in (Category.PARAMETER, Category.BUFFER)
    }
    stages = tuple(_checked(graph, s, casts, last_write) for s in graph.stages)
    return dataclasses.replace(graph, stages=stages)


def _autocast_casts(graph: Graph) -> set[int]:
    """Storages that hold a cast of a parameter."""
    casts: set[int] = set()
    for op in graph.ops:
        if op.name == "aten._to_copy.default" and op.phase is not Phase.BACKWARD:
            source = graph.storages[graph.values[op.inputs[0]].storage]
            if source.category is Category.PARAMETER:
                casts.update(graph.values[v].storage for v in op.outputs)
    return casts


def _checked(graph: Graph, stage: Stage, casts: set[int], last_write: dict[int, int]) -> Stage:
    if stage.refusal or stage.parent < 0:
        return stage
    arguments = {i.storage for i in stage.inputs}
    if any(last_write.get(sid, -1) >= stage.last for sid in arguments):
        return dataclasses.replace(stage, refusal="has an argument that is changed in place later")
    for op in graph.ops[stage.first : stage.last]:
        for value in op.inputs:
            sid = graph.values[value].storage
            if sid < 0 or sid in arguments or sid in casts:
                continue
            storage = graph.storages[sid]
            foreign = storage.category in (Category.ACTIVATION, Category.BATCH)
            if foreign and storage.born < stage.first:
                reason = f"{op.name} reads a tensor that is no argument of the call"
                return dataclasses.replace(stage, refusal=reason)
    return stage


def without_links(graph: Graph) -> Graph:
    """The graph in which no call takes what another returned: no region spans several of them."""

    def apart(stage: Stage) -> Stage:
        inputs = tuple(dataclasses.replace(i, source=None) for i in stage.inputs)
        return dataclasses.replace(stage, inputs=inputs)

    return dataclasses.replace(graph, stages=tuple(apart(s) for s in graph.stages))
