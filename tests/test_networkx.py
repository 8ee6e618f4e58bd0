"""A traced step as a graph of networkx."""

from __future__ import annotations

import networkx
import pytest
import torch
from torch import nn

import actckpt
from actckpt.tracing.tracer import trace_step
from tests.predictions import case_step
from tests.suite import CASES, adamw, trainable


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm"])
def test_edges_are_who_reads_what_was_made_or_changed_last(name: str) -> None:
    case = CASES[name]
    model = case.build()
    graph = trace_step(model, case_step(case, case.batch(), adamw(trainable(model))))
    flow = graph.to_networkx()
    wanted: dict[tuple[int, int], set[int]] = {}
    for reader, op in enumerate(graph.ops):
        for storage in {graph.values[v].storage for v in op.inputs}:
            makers = [
                i
                for i, before in enumerate(graph.ops[:reader])
                if not before.view
                and storage >= 0
                and storage in {*before.writes, *(graph.values[v].storage for v in before.outputs)}
            ]
            if makers and not op.view:
                wanted.setdefault((makers[-1], reader), set()).add(storage)
    assert set(flow.edges) == set(wanted)
    for edge, storages in wanted.items():
        assert flow.edges[edge]["bytes"] == sum(graph.storages[s].bytes for s in storages)
    assert list(flow) == [i for i, op in enumerate(graph.ops) if not op.view]
    assert networkx.is_directed_acyclic_graph(flow)
    assert {data["name"] for _, data in flow.nodes(data=True)} <= {op.name for op in graph.ops}


def test_a_chain_is_cut_at_every_operation_in_its_middle() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    graph = actckpt.trace(model, torch.randn(2, 4), loss_fn=lambda y: y.sum())
    flow = graph.to_networkx()
    forward = flow.subgraph(n for n, data in flow.nodes(data=True) if data["phase"] == "forward")
    modules = [forward.nodes[n]["module"] for n in networkx.topological_sort(forward)]
    assert modules == ["0", "1", "2"]
    (tanh,) = networkx.articulation_points(forward.to_undirected())
    assert forward.nodes[tanh] == {"name": "aten.tanh.default", "phase": "forward", "module": "1"}
