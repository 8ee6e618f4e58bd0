"""Graphs that a backward keeps while other forwards run: gradient penalties, inner steps (MAML).

They hold what they saved, and what the gradients are computed from, until the last backward comes.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import actckpt
from actckpt.session import company
from tests.loop_peaks import loop_peak, other_bits, weights

pytestmark = pytest.mark.usefixtures("flat_profile")
WIDTH = 16


class Mlp(nn.Module):
    """Rows in, rows or one number each out."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.head(x)
        return out


Models = list[Mlp]
Optimizers = list[torch.optim.Optimizer]
Step = Callable[[Models, Optimizers, torch.Tensor], None]


def penalty(critic: Mlp, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """WGAN-GP's: between data and what was made of noise, slopes are to be one."""
    share = torch.rand(len(real), 1)
    x = (share * real + (1 - share) * made).requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    found: torch.Tensor = (slope.norm(dim=1) - 1).square().mean()
    return found


def stepped(optimizer: torch.optim.Optimizer, *models: Mlp) -> None:
    optimizer.step()
    for model in models:
        model.zero_grad()


def adversarial(models: Models, optimizers: Optimizers, x: torch.Tensor, first: bool) -> None:
    critic, generator = models
    made: torch.Tensor = generator(torch.randn_like(x)).detach()
    if first:  # its graph is alive while the other forwards run
        slopes = penalty(critic, x, made)
        loss = critic(made).mean() - critic(x).mean()
    else:
        loss = critic(made).mean() - critic(x).mean()
        slopes = penalty(critic, x, made)
    (loss + 10 * slopes).backward()
    stepped(optimizers[0], critic)
    (-critic(generator(torch.randn_like(x))).mean()).backward()
    stepped(optimizers[1], generator, critic)


def penalty_first(models: Models, optimizers: Optimizers, x: torch.Tensor) -> None:
    adversarial(models, optimizers, x, True)


def penalty_last(models: Models, optimizers: Optimizers, x: torch.Tensor) -> None:
    adversarial(models, optimizers, x, False)


def maml(models: Models, optimizers: Optimizers, x: torch.Tensor) -> None:
    """Two tasks of two inner steps, whose graphs are alive until the task's backward."""
    (model,) = models
    for task in x.chunk(2):
        inner: dict[str, torch.Tensor] = dict(model.named_parameters())
        for _ in range(2):
            out = torch.func.functional_call(model, inner, (task,))
            slopes = torch.autograd.grad(
                out.square().mean(), list(inner.values()), create_graph=True
            )
            pairs = zip(inner.items(), slopes, strict=True)
            inner = {name: p - 0.1 * slope for (name, p), slope in pairs}
        torch.func.functional_call(model, inner, (task,)).square().mean().backward()
    stepped(optimizers[0], model)


def one_at_a_time(models: Models, optimizers: Optimizers, x: torch.Tensor) -> None:
    """The critic's own step is one forward; the generator is on the device meanwhile."""
    critic, generator = models
    made = generator(torch.randn_like(x[: len(x) // 4])).detach()
    critic(torch.cat([made, x])).square().mean().backward()
    stepped(optimizers[0], critic)
    critic(generator(torch.randn_like(x[: len(x) // 4]))).mean().backward()
    stepped(optimizers[1], generator, critic)


def loop(
    models: Models, step: Step, said: Callable[[], bool], steps: int = 3
) -> tuple[list[tuple[int, bool]], dict[str, torch.Tensor]]:
    """The peak of each step, whether it was said that it may take more; the weights at the end."""
    x = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1))
    optimizers: Optimizers = [torch.optim.AdamW(m.parameters(), 0.001) for m in models]
    found = []
    for seed in range(steps):
        torch.manual_seed(seed)
        peak = loop_peak(lambda: step(models, optimizers, x), *models, *optimizers, x)
        found.append((peak, said()))
    return found, weights(models)


@pytest.mark.kind("gradient penalties and inner steps (WGAN-GP, MAML)", bits=True, peak="within")
@pytest.mark.parametrize(
    ("step", "share"),
    [(penalty_first, 0.8), (penalty_last, 0.8), (maml, 0.85), (one_at_a_time, 0.8)],
)
def test_graphs_that_are_kept_count(
    step: Step, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    untouched = [Mlp()] if step is maml else [Mlp(), Mlp(WIDTH)]
    planned = copy.deepcopy(untouched)
    without, expected = loop(untouched, step, lambda: False)
    budget = share * without[-1][0]

    def said() -> bool:
        found = "may take more" in caplog.text or "may go over" in caplog.text
        caplog.clear()
        return found

    for model in planned:
        actckpt.optimize(model, budget / 1e9, policy="calls")
    peaks, found = loop(planned, step, said)
    assert not other_bits(expected, found)
    assert all(peak <= budget or was_said for peak, was_said in peaks), (budget, peaks)
    assert all(peak <= budget for peak, _ in peaks[2:]), (budget, peaks)


def test_a_graph_counts_until_a_backward_ends_it() -> None:
    model, x = Mlp(), torch.randn(64, WIDTH)
    actckpt.optimize(model, 1.0)

    def beside() -> int:
        model(x)
        assert company._NOW.company is not None
        return len(company._NOW.company.members) - 1

    def slopes() -> list[torch.Tensor]:
        """What gradients are computed from: the output is gone."""
        loss = model(x).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))

    found = slopes()
    assert beside() == 1
    del found
    assert beside() == 0
    found = slopes()
    # nothing but the head's own gradient is asked: the graph goes through the rest
    found[0].square().sum().backward()
    assert beside() == 0


def test_planning_keeps_no_computed_weights() -> None:
    model, x = Mlp(), torch.randn(64, WIDTH)
    actckpt.optimize(model, 1.0)
    inner = {name: 1.0 * p for name, p in model.named_parameters()}
    alive = [weakref.ref(p) for p in inner.values()]
    torch.func.functional_call(model, inner, (x,)).sum().backward()
    del inner
    gc.collect()
    assert not any(ref() is not None for ref in alive)
