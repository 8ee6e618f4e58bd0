"""The optimizer's step in a dry run, read from the trace: the same levels as one that is run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.planning import dry_run as dry_running
from actckpt.planning.dry_run import DryRun, dry_run
from actckpt.planning.optimizer_part import optimizer_part
from actckpt.profiler.build import build_profile
from actckpt.rewriting.program import Program
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import Optimizing
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from tests.models.mlp import MLP

Parameters = Any


def two(model: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    first, *others = model.parameters()
    return torch.optim.AdamW([first]), torch.optim.Adagrad(others)


class LetsGo(torch.optim.SGD):
    """Frees the gradients that it has used."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.zero_grad()


OPTIMIZERS: dict[str, Callable[[nn.Module], tuple[torch.optim.Optimizer, ...]]] = {
    "AdamW": lambda model: (torch.optim.AdamW(model.parameters()),),
    "momentum": lambda model: (torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),),
    "two": two,
}


def step_of(model: nn.Module, optimizers: Any, **given: Any) -> Step:
    when = {"in_backward": given.pop("in_backward", False)}
    found = tuple(Optimizing(o, **when) for o in optimizers)
    return Step(Call(torch.randn(16, 32)), lambda y: y.square().sum(), None, found, **given)


def run_instead(
    model: nn.Module, step: Step, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> DryRun:
    with monkeypatch.context() as patch:
        patch.setattr(dry_running, "optimizer_part", lambda *_: None)
        return dry_run(model, step, graph, Program(), build_profile(graph))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_if_it_had_run(name: str, accumulate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP(4, 32)
    step = step_of(model, OPTIMIZERS[name](model), accumulate=accumulate)
    graph = trace_step(model, step)
    assert optimizer_part(graph, step)
    read = dry_run(model, step, graph, Program(), build_profile(graph))
    run = run_instead(model, step, graph, monkeypatch)
    for field in dataclasses.fields(DryRun):
        if field.name != "lives":
            assert getattr(read, field.name) == getattr(run, field.name), field.name
    end = len(read.timeline)

    def living(dry: DryRun) -> Counter[Any]:
        """Whatever takes memory at some instant; what goes after the last one stays."""
        ends = ((x, x.died if 0 <= x.died < end else end) for x in dry.lives)
        return Counter(
            (x.born, died, x.bytes, x.category, x.since, x.op, x.name)
            for x, died in ends
            if x.bytes and died != x.born
        )

    assert living(read) == living(run)


def test_a_constant_that_only_the_optimizer_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP(4, 32)
    step = step_of(model, [torch.optim.AdamW(model.parameters(), foreach=True)])
    graph = trace_step(model, step)
    assert optimizer_part(graph, step)
    read = dry_run(model, step, graph, Program(), build_profile(graph))
    assert read.categories["constants"] == 4
    # the run one keeps that of the first step besides
    assert run_instead(model, step, graph, monkeypatch).peak_bytes == read.peak_bytes + 4


def test_what_a_module_holds_and_nobody_reads_counts_once() -> None:
    class Queue:
        def __init__(self) -> None:
            self.rows = torch.zeros(1 << 20)

    model = MLP(2, 8)
    model.queue = Queue()  # type: ignore[assignment]
    optimizer = Optimizing(torch.optim.Adam(model.parameters()))
    step = Step(Call(torch.randn(4, 8)), None, None, (optimizer,), False)
    found = dry_run(model, step, trace_step(model, step), Program())
    assert (1 << 22) <= found.categories["constants"] < (1 << 22) + 100


@pytest.mark.parametrize("why", ["in backward", "frees", "untraced"])
def test_otherwise_it_is_run(why: str) -> None:
    class Asks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if float(self.param_groups[0]["params"][0].sum()) > 0:
                super().step(closure)

    kind: type[torch.optim.SGD] = {"frees": LetsGo, "untraced": Asks}.get(why, torch.optim.SGD)
    model = MLP(4, 32)
    step = step_of(model, [kind(model.parameters(), 0.1, momentum=0.9)],
                   in_backward=why == "in backward")  # fmt: skip
    graph = trace_step(model, step)
    assert optimizer_part(graph, step) is None
    # what frees its gradients has no operations in the trace, whose first step freed them
    dry = dry_run(model, step, graph, Program())
    assert (len(dry.timeline) > len(graph.ops)) == (why == "frees")
