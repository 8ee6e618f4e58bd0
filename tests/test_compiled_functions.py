"""Functions that the user has compiled stay compiled, whatever is planned or measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from tests.models.blocks import Chain, Residual, rows

pytestmark = pytest.mark.usefixtures("flat_profile")


class Backend:
    """A compiler that compiles nothing, and counts how often its graphs are run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return module.forward(*args)

        return run


class Muon(torch.optim.Optimizer):
    """Updates by a compiled Newton-Schulz iteration, as public ones do."""

    def __init__(self, parameters: Any, backend: Backend) -> None:
        super().__init__(parameters, {"lr": 0.01})

        # of its own: what Dynamo makes of a function goes with its code
        namespace: dict[str, Any] = {}
        exec(
            "def orthogonal(g):\n"
            "    x = g / (g.norm() + 1e-7)\n"
            "    for _ in range(2):\n"
            "        x = 1.5 * x - 0.5 * (x @ x.T) @ x\n"
            "    return x\n",
            namespace,
        )
        self.orthogonal: Callable[..., Any] = torch.compile(
            namespace["orthogonal"], backend=backend, fullgraph=True, dynamic=False
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                update = self.orthogonal(p.grad) if p.ndim == 2 else p.grad
                p.add_(update, alpha=-group["lr"])


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def train(m: nn.Module, o: Muon, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        loss(m(rows())).backward()
        o.step()
        o.zero_grad()
    return [p.detach().clone() for p in m.parameters()]


def plan(m: nn.Module, o: Muon) -> None:
    actckpt.optimize(m, 1.0, batch=rows(), loss_fn=loss, optimizer=o)


def plan_later(m: nn.Module, o: Muon) -> None:
    actckpt.optimize(m, 1.0)


def trace(m: nn.Module, o: Muon) -> None:
    actckpt.trace(m, rows(), loss_fn=loss, optimizer=o)


def search(m: nn.Module, o: Muon) -> None:
    actckpt.find_max_batch(m, 1.0, lambda n: rows(n), loss_fn=loss, optimizer=o, limit=1)


def measure(m: nn.Module, o: Muon) -> None:
    actckpt.measure(m, rows(), loss_fn=loss, optimizer=o, steps=1)


@pytest.mark.kind("a compiled function in the optimizer stays compiled", bits=True)
@pytest.mark.parametrize(
    ("call", "warm"),
    [
        (plan, True),
        (plan, False),
        (plan_later, True),
        (trace, False),
        (search, False),
        (measure, True),
        (measure, False),
    ],
)
def test_a_compiled_function_stays_compiled(
    call: Callable[[nn.Module, Muon], None], warm: bool
) -> None:
    def make() -> tuple[nn.Module, Muon, Backend]:
        torch.manual_seed(0)
        model, backend = Chain(*(Residual() for _ in range(2))), Backend()
        optimizer = Muon(model.parameters(), backend)
        if warm:
            train(model, optimizer, 1)
            backend.runs = 0
        return model, optimizer, backend

    model, optimizer, backend = make()
    expected, runs = train(model, optimizer, 3), backend.runs
    assert runs
    model, optimizer, backend = make()
    call(model, optimizer)
    backend.runs = 0
    found = train(model, optimizer, 3)
    assert backend.runs == runs
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


class Lazy(nn.Module):
    """Compiles in its forward, as a module that is met for the first time may."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.compile(square, backend=self.backend)(self.linear(x))
        return out.sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own looks
def test_what_a_measured_forward_compiles_is_compiled() -> None:
    backend = Backend()
    model = Lazy(backend)
    actckpt.measure(model, torch.randn(2, 4), steps=1)
    backend.runs = 0
    model(torch.randn(2, 4)).backward()
    assert backend.runs
