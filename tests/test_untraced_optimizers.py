"""Optimizers whose step reads values, or runs the model: measured when it is made, or left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from tests.loop_peaks import loop_peak, other_bits, weights
from tests.models.blocks import Chain, Residual
from tests.models.blocks import rows as few_rows

pytestmark = pytest.mark.usefixtures("flat_profile")


class Clipping(torch.optim.SGD):
    """Looks at the norm of all gradients, as many do; takes three copies of the weights."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        found = [p for group in self.param_groups for p in group["params"]]
        if nn.utils.clip_grad_norm_(found, 1.0).item() < 1e6:
            copies = [
                p.detach().repeat(3) if p.ndim == 1 else p.detach().repeat(3, 1) for p in found
            ]
            assert len(copies) == len(found)
            super().step(closure)


class Failing(Clipping):
    """Raises in one of its steps."""

    fails = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.fails:
            raise ArithmeticError("not this time")
        super().step(closure)


def adafactor(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=1e-2)


def clipping(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return Clipping(parameters, 1e-2, momentum=0.9)


def library(name: str, module: str = "pytorch_optimizer") -> Callable[..., torch.optim.Optimizer]:
    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = getattr(pytest.importorskip(module), name)(parameters)
        return found

    make.__name__ = name
    return make


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(5))
    )


def rows(seed: int) -> torch.Tensor:
    return torch.randn(256, 48, generator=torch.Generator().manual_seed(seed))


def step(m: nn.Module, o: torch.optim.Optimizer, seed: int) -> None:
    m(rows(seed)).square().mean().backward()
    o.step()
    o.zero_grad()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.kind("optimizers whose step reads a value", bits=True, peak="within")
@pytest.mark.parametrize(
    "make",
    [adafactor, clipping, library("Prodigy"), library("DAdaptSGD")],
    ids=lambda f: f.__name__,
)
def test_a_step_that_reads_a_value_is_measured(
    make: Callable[..., torch.optim.Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    m = model()
    o = make(m.parameters())
    expected = []
    for seed in range(4):
        step(m, o, seed)
        expected.append(weights([m]))
    untouched = loop_peak(lambda: step(m, o, 4), m, vars(o))

    m = model()
    o = make(m.parameters())
    budget = int(0.9 * untouched)
    actckpt.optimize(m, budget / 1e9, loss_fn=lambda output: output.square().mean())
    for seed, end in enumerate(expected):
        step(m, o, seed)
        assert not other_bits(weights([m]), end)
    assert loop_peak(lambda: step(m, o, 4), m, vars(o)) <= budget
    (said,) = lines(caplog)
    assert said.startswith(f"actckpt: {type(o).__name__}: DataDependentOutputException at ")
    assert said.endswith("is measured when it is made, and planned for from then on")
    assert "this optimizer's step is not traced" in str(actckpt.report(m))


@pytest.mark.parametrize("given", [False, True])
def test_what_the_step_takes_is_in_the_plan(given: bool) -> None:
    """With rows so few that the optimizer's step is the peak."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 200))
    o = clipping(m.parameters())
    x = torch.randn(2, 200)

    def once() -> None:
        m(x).square().mean().backward()
        o.step()
        o.zero_grad()

    if given:
        actckpt.optimize(m, 1.0, batch=x, loss_fn=lambda y: y.square().mean(), optimizer=o)
    else:
        actckpt.optimize(m, 1.0)
    for _ in range(4):
        once()
    found = loop_peak(once, m, vars(o), x)
    assert actckpt.report(m).planned.predicted.peak_bytes == pytest.approx(found, rel=0.01)


def test_one_line_where_nothing_is_ever_run(caplog: pytest.LogCaptureFixture) -> None:
    m = Chain(Residual(), Residual())
    o = adafactor(m.parameters())
    graph = actckpt.trace(m, few_rows(), optimizer=o)
    assert not graph.optimizer_seen
    assert actckpt.Graph.from_json(graph.to_json()) == graph
    actckpt.find_max_batch(m, 1.0, lambda n: few_rows(n), optimizer=o, limit=2)
    assert len(lines(caplog)) == 2
    assert all("Adafactor" in line and "left out" in line for line in lines(caplog))


def test_an_optimizer_that_runs_the_model_is_left_out_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends = []
    for planned in (False, True):
        m = model()
        o = torch.optim.LBFGS(m.parameters(), max_iter=2)

        def closure(m: nn.Module = m, o: torch.optim.Optimizer = o) -> torch.Tensor:
            o.zero_grad()
            found: torch.Tensor = m(rows(0)).square().mean()
            found.backward()
            return found

        if planned:
            actckpt.optimize(m, 1.0)
        for _ in range(3):
            o.step(closure)
        ends.append(weights([m]))
    assert not other_bits(*ends)
    (said,) = lines(caplog)
    assert said == "actckpt: LBFGS runs the model in its step: what it takes is not bounded"


def test_a_step_that_fails_leaves_no_meter_behind() -> None:
    m = model()
    o = Failing(m.parameters(), 1e-2)
    actckpt.optimize(m, 1.0)
    step(m, o, 0)
    m(rows(1)).square().mean().backward()
    o.fails = True
    with pytest.raises(ArithmeticError):
        o.step()
    o.fails = False
    o.zero_grad()
    m(rows(1)).square().mean().backward()
    assert not torch._C._autograd._profiler_enabled()
    o.step()
    assert not torch._C._autograd._profiler_enabled()


def test_a_profiler_of_the_users_is_left_alone() -> None:
    m = model()
    o = clipping(m.parameters())
    actckpt.optimize(m, 1.0)
    step(m, o, 0)
    with torch.autograd.profiler.profile() as profiler:
        step(m, o, 1)
        assert torch._C._autograd._profiler_enabled()
    assert profiler.key_averages()
    for seed in range(2, 4):
        step(m, o, seed)
    assert "is not traced" in str(actckpt.report(m))


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # with create_graph
def test_a_step_through_the_graph_is_left_out_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """As of optimizers that multiply with the Hessian."""
    m = model()
    ends = []
    for planned in (False, True):
        m = model()
        o = library("AdaHessian")(m.parameters())
        if planned:
            actckpt.optimize(m, 1.0)
        for seed in range(3):
            torch.manual_seed(seed)
            m(rows(seed)).square().mean().backward(create_graph=True)
            o.step()
            for p in m.parameters():
                p.grad = None
        ends.append(weights([m]))
    assert not other_bits(*ends)
    (said,) = [line for line in lines(caplog) if "AdaHessian" in line]
    assert "its step goes backward through the forward again" in said
    assert said.endswith("is not bounded")
