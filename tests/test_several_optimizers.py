"""Every optimizer that steps on the model's parameters is planned for: bits, and the peak."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Category, Graph
from actckpt.data.plan import Plan, Region
from tests.exact import plan, region, saving
from tests.loop_peaks import loop_peak, other_bits, weights

BATCH, WIDTH, DEPTH = 160, 32, 3
pytestmark = pytest.mark.usefixtures("flat_profile")

Loop = Callable[[int], None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 8 * WIDTH)
        self.down = nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(DEPTH)))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


# Optimizers as people write them


class Steps:
    """The usual loop round any number of optimizers."""

    def __init__(self, m: nn.Module, optimizers: Iterable[Any]) -> None:
        self.model = m
        self.optimizers = list(optimizers)

    def __call__(self, seed: int) -> None:
        loss(self.model(batch(seed))).backward()
        for o in self.optimizers:
            o.step()
        self.model.zero_grad()

    def residents(self) -> list[Any]:
        return [self.model, *[vars(o) for o in self.optimizers]]


def muon_beside_adamw(m: nn.Module) -> Steps:
    matrices = [p for p in m.parameters() if p.ndim == 2]
    others = [p for p in m.parameters() if p.ndim != 2]
    return Steps(m, [torch.optim.AdamW(others, 1e-3), torch.optim.Muon(matrices, lr=1e-3)])


def adamw_in_two(m: nn.Module) -> Steps:
    halves = [m[:1].parameters(), m[1:].parameters()]  # type: ignore[index]
    return Steps(m, [torch.optim.AdamW(half, 1e-3) for half in halves])


def one_per_parameter(m: nn.Module) -> Steps:
    return Steps(m, [torch.optim.AdamW([p], 1e-3) for p in m.parameters()])


class InBackward(Steps):
    """Each parameter has an optimizer, which steps as soon as its gradient is there."""

    frees = True

    def __init__(self, m: nn.Module) -> None:
        of = {p: torch.optim.AdamW([p], 1e-3) for p in m.parameters()}
        super().__init__(m, of.values())

        def step(p: torch.Tensor) -> None:
            of[p].step()  # type: ignore[index]
            if self.frees:
                of[p].zero_grad()  # type: ignore[index]

        for p in of:
            p.register_post_accumulate_grad_hook(step)

    def __call__(self, seed: int) -> None:
        loss(self.model(batch(seed))).backward()
        self.model.zero_grad()


class KeepingGradients(InBackward):
    frees = False


class EverySecondTime(InBackward):
    """Gradients of two backwards are added before the hooks step."""

    def __init__(self, m: nn.Module) -> None:
        of = {p: torch.optim.AdamW([p], 1e-3) for p in m.parameters()}
        Steps.__init__(self, m, of.values())
        self.steps = False

        def step(p: torch.Tensor) -> None:
            if self.steps:
                of[p].step()  # type: ignore[index]
                p.grad = None

        for p in of:
            p.register_post_accumulate_grad_hook(step)

    def __call__(self, seed: int) -> None:
        for self.steps in (False, True):
            loss(self.model(batch(seed + 100 * self.steps))).backward()


class PastGradients(torch.optim.Optimizer):
    """Averages the last gradients, which it keeps in a deque of its own."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3})
        self.past: deque[list[torch.Tensor]] = deque(maxlen=3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        found = [p for group in self.param_groups for p in group["params"]]
        self.past.append([p.grad.clone() for p in found])
        for n, p in enumerate(found):
            p.sub_(sum(gradients[n] for gradients in self.past), alpha=1e-3)


class Lookahead:
    """Slow weights beside another optimizer's; none of torch's classes."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.slow = {p: p.detach().clone() for g in inner.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        self.inner.step()
        for p, slow in self.slow.items():
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class SharpnessAware(Steps):
    """Two passes a step: weights are moved between them, and kept meanwhile."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__(m, [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9)])

    def __call__(self, seed: int) -> None:
        (o,) = self.optimizers
        loss(self.model(batch(seed))).backward()
        with torch.no_grad():
            for p in self.model.parameters():
                o.state[p]["kept"] = p.clone()
                p.add_(0.05 * p.grad)  # type: ignore[operator]
        self.model.zero_grad()
        loss(self.model(batch(seed))).backward()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(o.state[p].pop("kept"))
        o.step()
        self.model.zero_grad()


SETUPS: dict[str, Callable[[nn.Module], Steps]] = {
    "Muon beside AdamW": muon_beside_adamw,
    "one per parameter": one_per_parameter,
    "inside backward": InBackward,
    "inside backward, gradients kept": KeepingGradients,
    "inside backward, every second time": EverySecondTime,
    "state in a deque": lambda m: Steps(m, [PastGradients(m.parameters())]),
    "slow weights": lambda m: Steps(m, [Lookahead(torch.optim.AdamW(m.parameters(), 1e-3))]),
    "sharpness-aware": SharpnessAware,
}


def ends(setup: str, steps: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Weights of the untouched model after each step, and the peak of a further one."""
    m = model()
    loop = SETUPS[setup](m)
    found = []
    for seed in range(steps):
        loop(seed)
        found.append(weights([m]))
    return found, loop_peak(lambda: loop(steps), *loop.residents())


@pytest.mark.kind("every optimizer that steps on the model's parameters", bits=True, peak="within")
@pytest.mark.parametrize("setup", SETUPS)
def test_bits_and_budget_with(setup: str) -> None:
    expected, untouched = ends(setup, 3)
    m = model()
    loop = SETUPS[setup](m)
    budget = int(0.8 * untouched)
    actckpt.optimize(m, budget / 1e9)
    for seed, end in enumerate(expected):
        loop(seed)
        assert not other_bits(weights([m]), end), seed
    peak = loop_peak(lambda: loop(3), *loop.residents())
    assert 0.7 * budget < peak <= budget
    made = actckpt.report(m).plan
    assert made.regions or made.bursts


def by_blocks(graph: Graph, *_: Any) -> Plan:
    """Each block again, but for what `gelu` returns: its ``down`` is not needed then."""
    blocks = [str(n) for n in range(DEPTH)]
    return plan(*(region(b, saved=saving(graph, b, "aten.gelu")) for b in blocks))


@pytest.mark.kind("a parameter that no recomputation reads may step inside backward", bits=True)
@pytest.mark.parametrize("policy", [by_blocks, "log"])
def test_a_parameter_that_is_not_read_again_may_have_stepped(policy: Any) -> None:
    expected, _ = ends("inside backward", 2)
    m = model()
    loop = InBackward(m)
    actckpt.optimize(m, None, policy=policy)
    for seed, end in enumerate(expected):
        loop(seed)
        assert not other_bits(weights([m]), end), seed


class ReadsAgain(Block):
    """``up`` has all its gradients before the product's are, for which it is needed again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            again = x @ self.up.weight.t()
        product = self.norm(x).repeat(1, 8) * again
        out: torch.Tensor = self.down(self.up(self.down(product)))
        return out


@pytest.mark.parametrize("inside", [(), (region("0.norm"),)])
def test_a_parameter_that_is_read_again_must_not_have_stepped(inside: tuple[Region, ...]) -> None:
    def late(graph: Graph, *_: Any) -> Plan:
        return plan(region("0", None, *inside, saved=saving(graph, "0", "aten.addmm", "aten.mul")))

    m = nn.Sequential(ReadsAgain())
    loop = InBackward(m)
    actckpt.optimize(m, None, policy=late)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \S*up.weight was"):
        loop(0)


def test_given_optimizers_are_planned_for_at_once() -> None:
    m = model()
    loop = muon_beside_adamw(m)
    graph = actckpt.trace(m, batch(), loss_fn=loss, optimizer=loop.optimizers)
    held = sum(s.bytes for s in graph.storages if s.category is Category.OPTIMIZER)
    measured = actckpt.measure(m, batch(), loss_fn=loss, optimizer=loop.optimizers, steps=1)
    assert measured.split["optimizer"] == held > 0
    fewer = actckpt.trace(m, batch(), loss_fn=loss, optimizer=loop.optimizers[0])
    assert held > sum(s.bytes for s in fewer.storages if s.category is Category.OPTIMIZER)
    actckpt.optimize(m, 1.0, batch=batch(), loss_fn=loss, optimizer=loop.optimizers)
    assert actckpt.report(m).planned.predicted.peak_bytes == pytest.approx(measured.peak_bytes)
    found = actckpt.find_max_batch(
        m, 1.0, lambda n: batch()[:n], loss_fn=loss, optimizer=loop.optimizers, limit=1
    )
    assert found.largest == 1


def test_planned_once_for_optimizers_that_were_given(caplog: pytest.LogCaptureFixture) -> None:
    m = model()
    loop = muon_beside_adamw(m)
    actckpt.optimize(m, 1.0, batch=batch(), optimizer=loop.optimizers)
    with caplog.at_level(logging.INFO, "actckpt"):
        for seed in range(3):
            loop(seed)
    assert not caplog.records


def test_measured_inside_backward() -> None:
    """What hooks step is stepped once, is counted, and is put back."""
    m = model()
    loop = InBackward(m)
    before = weights([m])
    found = actckpt.measure(m, batch(), loss_fn=loss, steps=1)
    assert not any(o.state for o in loop.optimizers)
    assert not other_bits(before, weights([m]))
    loop(0)
    state = [vars(o)["state"] for o in loop.optimizers]
    assert found.split["optimizer"] == sum(
        t.nbytes for s in state for values in s.values() for t in values.values()
    )
    again = actckpt.measure(m, batch(), loss_fn=loss, optimizer=loop.optimizers, steps=1)
    assert again.peak_bytes == found.peak_bytes


def test_an_optimizer_of_another_model_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    m, other = model(), model()
    loop, others = Steps(m, [torch.optim.SGD(m.parameters(), 0.1)]), adamw_in_two(other)
    actckpt.optimize(m, 1.0, batch=batch(), optimizer=loop.optimizers)
    with caplog.at_level(logging.INFO, "actckpt"):
        others(0)
        loop(0)
        copy.deepcopy(m)
        loop(1)
    assert not caplog.records


def test_an_optimizer_that_is_dropped_is_not_kept_alive() -> None:
    import gc
    import weakref

    m = model()
    actckpt.optimize(m, 1.0)
    loop = Steps(m, [torch.optim.AdamW(m.parameters(), 1e-3)])
    for seed in range(2):
        loop(seed)
    gone = weakref.ref(loop.optimizers[0])
    del loop
    gc.collect()
    assert gone() is None
    again = Steps(m, [torch.optim.AdamW(m.parameters(), 1e-3)])
    for seed in range(2):
        again(seed)


def test_a_model_whose_optimizers_step_in_backward_is_not_kept_alive() -> None:
    def trained() -> list[weakref.ref[Any]]:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        optimizers = {p: torch.optim.SGD([p], 0.01, momentum=0.9) for p in model.parameters()}

        def step(p: torch.Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            optimizers[p].zero_grad()  # type: ignore[index]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        actckpt.optimize(model, 0.001)
        batches = [torch.randn(4, 8) for _ in range(3)]
        for x in batches:
            model(x).sum().backward()
        return [weakref.ref(model), *(weakref.ref(x.untyped_storage()) for x in batches)]

    kept = trained()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


def test_an_optimizer_without_a_state_of_its_own() -> None:
    class Descent:
        def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
            self.param_groups = [{"params": list(parameters), "lr": 0.01}]

        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
                p.add_(p.grad, alpha=-0.01)
                p.grad = None

    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizers: list[Any] = [Descent(first.parameters()), Descent(second.parameters())]
    for model, optimizer in zip((first, second), optimizers, strict=True):
        actckpt.optimize(model, 0.01, optimizer=optimizer)
    for _ in range(2):
        second(first(torch.randn(4, 8))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_what_is_no_optimizer_is_refused() -> None:
    m = model()
    with pytest.raises(TypeError, match="a list of several; found Linear"):
        actckpt.optimize(m, 1.0, optimizer=[nn.Linear(2, 2)])  # type: ignore[list-item]
