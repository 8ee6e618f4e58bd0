"""Operations on fakes that came before: what is made again is what torch would have made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import actckpt
from actckpt.data.graph import Graph
from actckpt.planning.dry_run import DryRun, dry_run
from actckpt.rewriting.program import Program
from actckpt.tracing import mode
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import Optimizing
from actckpt.tracing.repeated import Repeated
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step


class Never(Repeated):
    """Every operation is torch's own."""

    def key(self, *_: Any) -> None:
        return None


class Counted(Repeated):
    """Counts what was made again."""

    made = 0

    def results(self, *given: Any) -> tuple[bool, Any]:
        known, out = super().results(*given)
        self.made += known
        return known, out


class Block(nn.Module):
    """Results of every kind: own storages, windows, lists of them, arguments written into."""

    count: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.mix = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.out = nn.Linear(2 * width, width)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count % 2 == 0:  # the number is asked, and must not be another block's
            x = x + 1
        h = self.gru(self.norm(x))[0]
        h = h + self.mix(x.transpose(1, 2)).transpose(1, 2)
        a, b = h.chunk(2, dim=-1)
        c = torch.cat([a.sigmoid(), b.tanh(), x], dim=-1).relu_()
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)[0]
        c = c.masked_fill(mask[None, :, None], 0)
        rows = c.reshape(-1, c.shape[-1])[torch.arange(4)]  # an index, no mask
        c = c.index_put((torch.tensor(0),), c[0] + rows.sum())
        # equal constants of other types give other types
        kinds = [torch.full((2,), k).to(x) for k in (1, 1.0, True)]
        d = functional.dropout(self.out(c), 0.1) * sum(k.sum() for k in kinds)
        d.t_() if d.dim() == 2 else d.transpose_(0, 1).transpose_(0, 1)
        return x + functional.scaled_dot_product_attention(d, d, d)


class Net(nn.Module):
    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return functional.mse_loss(x, torch.zeros_like(x)) + functional.mse_loss(
            x, torch.ones_like(x)
        )


def step_of(model: nn.Module, **given: Any) -> Step:
    optimizers = (Optimizing(torch.optim.AdamW(model.parameters())),)
    return Step(Call(torch.randn(2, 6, 8)), lambda out: out, None, optimizers, **given)


def traced(model: nn.Module, step: Step) -> tuple[Graph, DryRun]:
    graph = trace_step(model, step)
    return graph, dry_run(model, step, graph, Program())


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_same_graph_and_dry_run(accumulate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    step = step_of(model, accumulate=accumulate)
    monkeypatch.setattr(mode, "REPEATED", Never())
    graph, dry = traced(model, step)
    counted = Counted()
    monkeypatch.setattr(mode, "REPEATED", counted)
    for _ in range(2):  # what one block repeats of another, and what a second trace does of all
        again, dry_again = traced(model, step)
        assert again == graph
        assert dry_again == dry
    assert counted.made > 2 * len(graph.ops)


def test_types_and_defaults_that_promote_otherwise_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Promotes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found = [(ids * k).to(torch.int8) for k in (1, 1.0, True)]
            kinds = [(ids * k).dtype for k in (1, 1.0, True)]
            assert kinds == [torch.int64, torch.get_default_dtype(), torch.int64]
            return (self.weight * sum(found)).sum()

    monkeypatch.setattr(mode, "REPEATED", Repeated())
    step = Step(Call(torch.arange(4)), lambda out: out)
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            trace_step(Promotes(), step)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_mask_as_an_index_still_asks_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, keep: torch.Tensor) -> torch.Tensor:
            return self.weight[keep].sum()

    monkeypatch.setattr(mode, "REPEATED", Repeated())
    found = []
    for keep in ([True, True, False, False], [True, False, False, False]):
        graph = trace_step(Picks(), Step(Call(torch.tensor(keep)), lambda out: out))
        found.append(next(v.shape for op in graph.ops if op.name == "aten.index.Tensor"
                          for v in (graph.values[op.outputs[0]],)))  # fmt: skip
    assert found == [(2,), (1,)]


class Signed(nn.Module):
    """Where the input is large, the sign of ``value`` alone counts."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        y: torch.Tensor = self.outer(torch.copysign(h.abs(), h.masked_fill(h > 3, self.value)))
        return x + y


def test_zeros_of_either_sign_are_two_constants() -> None:
    """Bursts run what the signature says, and would run the first for both."""
    model = nn.Sequential(*[Signed(value) for value in (0.0, 0.0, -0.0, -0.0)])
    untouched = copy.deepcopy(model)
    actckpt.optimize(model, 0.0020, policy="optimal")
    for scale in (0.1, 5.0):
        x = scale * torch.randn(512, 64)
        for one in (model, untouched):
            one.zero_grad()
            one(x).square().sum().backward()
        for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert actckpt.report(model).plan.bursts


def test_under_inference_mode_torch_is_asked() -> None:
    """There, views of normal tensors are normal ones, and new tensors are not."""
    view, x = torch.ops.aten.view.default, torch.randn(4, 6)
    with FakeTensorMode() as fakes:
        arguments = (fakes.from_tensor(x), [6, 4])
        assert Repeated().key(view, arguments, {}, False) is not None
        with torch.inference_mode():
            assert Repeated().key(view, arguments, {}, False) is None
