"""The trace is what a real step does, and nothing is left of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.graph import Graph, Phase
from actckpt.tracing.mode import SKIPPED
from actckpt.tracing.tracer import trace_step
from tests.predictions import autocast, case_step
from tests.suite import CASES, Case, call, loss_of

each_case = pytest.mark.parametrize("name", CASES)
STEP = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)


class OpNames(TorchDispatchMode):
    """Names of the operations of a real step, without autograd's bookkeeping."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in SKIPPED and func.namespace not in ("prim", "profiler"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@dataclass
class Real:
    """What a real forward and backward did: operations, and bytes saved for backward."""

    ops: list[str]
    saved_bytes: int


def real(case: Case, model: nn.Module) -> Real:
    """One forward, loss and backward, as a user writes them."""
    batch = case.batch()
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    held |= {t.untyped_storage()._cdata for t in tensors_of(batch)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage  # kept, so that no other takes its place
        return tensor.detach()

    mode = OpNames()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), mode:
        with autocast(case):
            output = call(model, batch)
            loss = loss_of(case, output)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return Real(mode.names, sum(s.nbytes() for s in saved.values()))


def tensors_of(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, dict) else batch
    return [t for t in values if isinstance(t, torch.Tensor)]


def traced(case: Case, model: nn.Module) -> Graph:
    with autocast(case):
        return trace_step(model, case_step(case, case.batch(), None))


def saved_bytes(graph: Graph) -> int:
    storages = {graph.values[s.value].storage for s in graph.saves if not s.held}
    return sum(graph.storages[s].bytes for s in storages)


def first_difference(a: list[str], b: list[str]) -> str:
    for i, (x, y) in enumerate(itertools.zip_longest(a, b)):
        if x != y:
            around = slice(max(0, i - 3), i + 3)
            return f"operation {i} of {len(a)} and {len(b)}: {a[around]}, {b[around]}"
    return ""


def variant(case: Case, dropout: bool, cast: bool) -> Case:
    """The case with every dropout of its model on or off, and autocast on or off."""
    import dataclasses

    def build() -> nn.Module:
        model = case.build()
        for module in model.modules():
            if not dropout and isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return dataclasses.replace(case, build=build, autocast=cast)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@each_case
def test_trace_lists_the_operations_and_saves_of_a_real_step(name: str, cast: bool) -> None:
    case = variant(CASES[name], True, cast)
    model = case.build()
    graph, run = traced(case, model), real(case, model)
    names = [op.name for op in graph.ops]
    assert not first_difference(names, run.ops)
    assert saved_bytes(graph) == run.saved_bytes
