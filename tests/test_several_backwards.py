"""Steps with several backwards over one graph: learned in the first, planned for in the next."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

import actckpt
from actckpt.profiler.census import resident_bytes
from actckpt.profiler.meter import AllocatorMeter
from tests.exact import differences

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class Tasks(nn.Module):
    """A trunk, and a loss for each of three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return [head(x).square().mean() for head in self.heads]


def total(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(losses).sum()


def batch() -> torch.Tensor:
    return torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1))


def several(model: nn.Module, x: torch.Tensor) -> None:
    """A backward per task."""
    losses = model(x)
    for n, loss in enumerate(losses):
        loss.backward(retain_graph=n < 2)


def projected(model: nn.Module, x: torch.Tensor) -> None:
    """Gradients per task, held side by side (PCGrad)."""
    losses = model(x)
    parameters = list(model.parameters())
    found = [
        torch.autograd.grad(loss, parameters, retain_graph=n < 2, allow_unused=True)
        for n, loss in enumerate(losses)
    ]
    for p, *gradients in zip(parameters, *found, strict=True):
        for g in gradients:
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)


def norms(model: nn.Module, x: torch.Tensor) -> None:
    """A backward, then each task's gradient of one weight (GradNorm)."""
    losses = model(x)
    weight = model.get_parameter("blocks.3.down.weight")
    total(losses).backward(retain_graph=True)
    for n, loss in enumerate(losses):
        torch.autograd.grad(loss, weight, retain_graph=n < 2)


def penalized(model: nn.Module, x: torch.Tensor) -> None:
    """The slope of the loss is part of the loss."""
    x = x.detach().requires_grad_()
    loss = total(model(x))
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()


def plain(model: nn.Module, x: torch.Tensor) -> None:
    total(model(x)).backward()


def inner_steps(model: nn.Module, x: torch.Tensor) -> None:
    """Two steps of gradients whose graph is kept, on weights that they make (MAML)."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    for _ in range(2):
        loss = total(torch.func.functional_call(model, weights, (x,)))
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        pairs = zip(weights.items(), slopes, strict=True)
        weights = {name: w - 0.1 * slope for (name, w), slope in pairs}
    total(torch.func.functional_call(model, weights, (x,))).backward()


Step = Callable[[nn.Module, torch.Tensor], None]


def peak(step: Step, model: nn.Module, x: torch.Tensor) -> int:
    """Highest level of a step in the user's own loop, by the allocator."""
    model.zero_grad()
    gc.collect()
    before = sum(resident_bytes(model, None, x).values())
    with AllocatorMeter("cpu") as meter:
        step(model, x)
    model.zero_grad()
    return before + meter.peak_bytes


def trained(step: Step, model: nn.Module, steps: int = 3) -> dict[str, torch.Tensor]:
    """Gradients and weights of some steps."""
    found: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = batch()
    for n in range(steps):
        step(model, x)
        found.update((f"{n} {name}", p.grad.clone()) for name, p in model.named_parameters())  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: p.detach().clone() for name, p in model.named_parameters()}


def kept(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "keeps its graph" in r.message]


@pytest.mark.kind("several backwards over one graph", bits=True, peak="said")
@pytest.mark.parametrize(
    ("step", "policy"),
    [
        (several, "auto"),
        (several, "calls"),
        (projected, "calls"),
        (norms, "calls"),
        (penalized, "calls"),
    ],
    ids=["several-auto", "several-calls", "projected-calls", "norms-calls", "penalized-calls"],
)
def test_the_first_step_says_that_it_may_go_over_and_the_next_fit(
    step: Step, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    reference = Tasks()
    model = copy.deepcopy(reference)
    trained(step, reference, 1)
    share = 0.78 if step is penalized else 0.7  # the graph of the gradients is no forward's
    budget = int(share * peak(step, reference, batch()))
    reference = copy.deepcopy(model)
    actckpt.optimize(model, budget / 1e9, batch=batch(), loss_fn=total, policy=policy)
    with caplog.at_level(logging.WARNING, "actckpt"):
        found = trained(step, model)
    assert len(kept(caplog)) == 1
    assert not differences(trained(step, reference), found)
    assert peak(step, model, batch()) <= budget
    report = actckpt.report(model)
    assert report.planned.predicted.peak_bytes <= budget
    assert any("backwards over one graph" in note for note in report.notes)
    once = actckpt.optimize(copy.deepcopy(reference), budget / 1e9, batch=batch(), loss_fn=total,
                            policy=policy)  # fmt: skip
    assert report.planned.predicted.step_s > actckpt.report(once).planned.predicted.step_s
    assert report.baseline.predicted.peak_bytes > budget


def test_a_budget_that_they_do_not_fit_is_refused_before_the_second_step() -> None:
    torch.manual_seed(0)
    model = Tasks()
    alone = actckpt.optimize(copy.deepcopy(model), None, batch=batch(), loss_fn=total,
                             policy="full")  # fmt: skip
    smallest = actckpt.report(alone).planned.predicted.peak_bytes
    actckpt.optimize(model, 1.02 * smallest / 1e9, batch=batch(), loss_fn=total, policy="calls")
    projected(model, batch())
    model.zero_grad()
    with pytest.raises(actckpt.BudgetError, match="GB that the step needs"):
        model(batch())


def test_a_loss_that_runs_them_itself_is_planned_for_before_the_first_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def states(losses: list[torch.Tensor]) -> torch.Tensor:
        for loss in losses[:-1]:
            loss.backward(retain_graph=True)
        return losses[-1]

    torch.manual_seed(0)
    reference = Tasks()
    model = copy.deepcopy(reference)
    budget = int(0.8 * peak(several, reference, batch()))
    actckpt.optimize(model, budget / 1e9, batch=batch(), loss_fn=states, policy="calls")
    assert peak(several, model, batch()) <= budget
    assert not differences(trained(several, reference), trained(several, model))
    assert not kept(caplog)


@pytest.mark.kind("inner steps on computed weights (MAML)", bits=True, peak="said")
@pytest.mark.usefixtures("flat_profile")
def test_inner_steps_are_recomputed_and_said_not_to_be_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    reference = Tasks()
    model = copy.deepcopy(reference)
    actckpt.optimize(model, None, batch=batch(), loss_fn=total, policy="full")
    with caplog.at_level(logging.WARNING, "actckpt"):
        found = trained(inner_steps, model, 2)
    assert not differences(trained(inner_steps, reference, 2), found)
    assert sum("weights that were computed" in r.message for r in caplog.records) == 1
    most = peak(inner_steps, reference, batch())
    assert peak(inner_steps, model, batch()) <= 0.75 * most
