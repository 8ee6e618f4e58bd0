"""Predictions of a plan beside what real steps of the suite's models need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Category, Graph, Phase
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.planning.choosing import choose_plan
from actckpt.planning.dry_run import dry_run
from actckpt.planning.request import Planned, Request
from actckpt.pricing.simulate import Pricer
from actckpt.profiler.build import build_profile
from actckpt.profiler.live import LiveMeter
from actckpt.rewriting.installing import install, uninstall
from actckpt.rewriting.program import Program, compile_plan
from actckpt.rewriting.rewrite import Rewrite
from actckpt.tracing.call import Call, tensors
from actckpt.tracing.mode import SKIPPED, flat_outputs, flat_tensors
from actckpt.tracing.optimizing import optimizers_of
from actckpt.tracing.step import Step, run_step
from actckpt.tracing.tracer import trace_step
from tests.suite import CASES, Case, MakeOptimizer, adamw, trainable


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case of the suite with its trace and profile. ``model`` carries no rewrite."""

    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    graph: Graph
    profile: Profile
    pricer: Pricer


def case_step(case: Case, batch: Any, optimizer: torch.optim.Optimizer | None) -> Step:
    """The training step of a case as the planner is told of it."""
    return Step(Call.of(batch), case.loss_fn, None, optimizers_of(optimizer), case.micro_steps > 1)


def autocast(case: Case) -> torch.autocast:
    """The context in which a case plans and runs its forward."""
    return torch.autocast("cpu", torch.bfloat16, enabled=case.autocast)


@cache
def prepared(name: str, make_optimizer: MakeOptimizer | None = None) -> Prepared:
    """Traced and profiled once per process, with the case's own optimizer unless one is given."""
    case = CASES[name]
    model = case.build()
    optimizer = (make_optimizer or case.optimizer or adamw)(trainable(model))
    step = case_step(case, case.batch(), optimizer)
    with autocast(case):
        graph = trace_step(model, step)
        profile = build_profile(graph, progress=False)
    return Prepared(case, model, optimizer, step, graph, profile, Pricer(graph, profile))


def planned(p: Prepared, policy: str, budget_bytes: int | None, scope: str = "step") -> Planned:
    """The plan that `actckpt.optimize` would put in force.

    Raises:
        BudgetError: nothing fits.
    """
    with autocast(p.case):
        request = Request(budget_bytes, policy, scope)
        return choose_plan(p.model, p.step, request, p.graph, p.profile)


def smallest(p: Prepared, policy: str, scope: str = "step") -> int:
    """The smallest budget that the policy says it can meet."""
    with pytest.raises(BudgetError) as raised:
        planned(p, policy, 1, scope)
    found = raised.value.smallest_bytes
    assert found is not None
    return found


@contextmanager
def in_force(model: nn.Module, program: Program) -> Iterator[None]:
    """The model under a plan; its first step is not checked by hashes, as in a steady step."""
    install(Rewrite(model, program, check=False))
    try:
        yield
    finally:
        uninstall(model)


@dataclass(frozen=True, slots=True)
class Agreement:
    """One plan by three accounts, workspaces left out of the live storages."""

    price_peak_bytes: int
    price_added_bytes: int
    dry_live_bytes: int
    real_live_bytes: int


@cache
def agreement(name: str, plan: Plan) -> Agreement:
    """The price of a plan, and live storages of its dry run and of a real step under it."""
    p = prepared(name)
    price = p.pricer.price(plan)
    program = compile_plan(p.graph, plan, p.profile)
    with autocast(p.case):
        dry = dry_run(p.model, p.step, p.graph, program, p.profile)
    with in_force(p.model, program):
        real = real_live_bytes(p)
    return Agreement(price.peak_bytes, price.added_bytes, dry.live_bytes, real)


class LiveMode(TorchDispatchMode):
    """Registers every tensor that an operation of a real step takes or returns."""

    def __init__(self, live: LiveMeter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for t in flat_tensors((*args, *kwargs.values())):
            self.live.register(t, Category.CONSTANT)
        out = func(*args, **kwargs)
        if func not in SKIPPED:
            for t in flat_outputs(out):
                self.live.register(t)
        return out


@contextmanager
def live_storages(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Any
) -> Iterator[LiveMeter]:
    """Meters real storages from here on; what is resident is entered first."""
    with LiveMeter("cpu") as live:
        for p in model.parameters():
            live.register(p, Category.PARAMETER)
            if p.grad is not None:
                live.register(p.grad, Category.GRADIENT)
        for t in model.buffers():
            live.register(t, Category.BUFFER)
        for t in tensors(list(optimizer.state.values()) if optimizer is not None else ()):
            live.register(t, Category.OPTIMIZER)
        for t in tensors(batch):
            live.register(t, Category.BATCH)
        get_state: Callable[[], torch.Tensor] = torch.get_rng_state

        def get_rng_state() -> torch.Tensor:
            # no operation returns it, but regions keep it
            state = get_state()
            live.register(state)
            return state

        with patch.object(torch, "get_rng_state", get_rng_state), LiveMode(live):
            yield live


def real_live_bytes(p: Prepared) -> int:
    """Highest sum of the live storages of one real step of the prepared model, as it is."""
    p.model.zero_grad(set_to_none=True)
    with autocast(p.case):
        run_step(p.model, p.step)
        p.optimizer.step()  # its state exists from now on
        if not p.step.accumulate:
            p.model.zero_grad(set_to_none=True)
        with live_storages(p.model, p.optimizer, (p.step.call, p.step.target)) as live:
            run_step(p.model, p.step)
            p.optimizer.step()
            return live.peak_bytes


def phases(graph: Graph, *wanted: Phase) -> list[str]:
    """Names of the operations of some phases, in order."""
    return [op.name for op in graph.ops if op.phase in wanted]
