"""The public functions."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from actckpt.batch_search import MAX_BATCH, BatchSearch, BatchTried, search
from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Graph
from actckpt.in_use import forget, refuse_strange
from actckpt.measuring import measure_step
from actckpt.optimizer_watch import tell_untraced
from actckpt.planning import SCOPES, Request, make_plan
from actckpt.policies import POLICIES, Policy
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.rewriting.installing import install, installed, uninstall
from actckpt.rewriting.sharing import refuse_shared
from actckpt.session import Session, session_of
from actckpt.tracing.call import Call, LossFn
from actckpt.tracing.compiled import is_compiler_wrapper
from actckpt.tracing.forwards import FORWARD
from actckpt.tracing.lightning import TRAINING_STEP, is_lightning, refuse_manual, training_call
from actckpt.tracing.optimizing import Optimizing, optimizers_of
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import model_device, trace_step

M = TypeVar("M", bound=nn.Module)
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None

# what an untouched model was measured at, for the report of the plan that it gets later
_UNTOUCHED: weakref.WeakKeyDictionary[nn.Module, Measurement] = weakref.WeakKeyDictionary()


def optimize(
    model: M,
    budget_gb: float | None,
    *,
    batch: Any = None,
    loss_fn: LossFn | None = None,
    target: Any = None,
    optimizer: Optimizers = None,
    accumulate: bool = False,
    policy: str | Policy = "auto",
    scope: str = "step",
) -> M:
    """The same model, changed in place so that a training step stays within a budget.

    Outputs, gradients, buffers and random states stay bitwise the same. If the untouched model
    fits, nothing is recomputed. Calling it again replaces the plan; `revert` takes it off.

    Args:
        budget_gb: bound in GB (10^9 bytes), positive; None applies a named policy without a bound.
        batch: a tensor (one positional argument), a tuple (positional), a dict (keyword) or a
            `Call`. None plans on the first forward with gradients, from its arguments. Of a
            LightningModule ``training_step`` is planned: what its loader gives, in any nesting.
        loss_fn: ``loss_fn(output)``, or ``loss_fn(output, target)`` when ``target`` is given,
            returning a scalar. By default the output's ``.loss``, ``["loss"]``, or itself if it is
            a scalar; else backward is taken to start from the outputs.
        optimizer: one, or a list of several: their state and their steps count, also before the
            first. Others that step the model's parameters are learned from their first step, and
            planned again.
        accumulate: gradients are resident when a step begins.
        policy: a name in `POLICIES`, or a callable ``(graph, profile, budget_bytes) -> Plan``.
        scope: "step" bounds the peak of allocated device memory over the whole step,
            "activations" what the step adds to parameters, gradients, optimizer state and batch.

    Raises:
        BudgetError: no plan of the policy fits, or the budget is no positive number.
        PlanError: the model cannot be planned for, or the policy's plan is malformed.
        TraceError: the training step cannot be traced.
        Exception: whatever the model raises for this batch. After any error the model is as it
            was before the call.
    """
    request = Request(_budget_bytes(budget_gb, policy), _policy(policy), _scope(scope))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    _refuse(model)
    call = None
    if batch is not None:
        _refuse_loss(model, loss_fn)
        call = _call(model, batch, loss_fn)[0]
    session = Session(
        model,
        request,
        loss_fn=loss_fn,
        target=target,
        optimizers=_optimizers(model, optimizer),
        accumulate=accumulate,
    )
    before, earlier = installed(model), session_of(model)
    try:
        if call is None:
            session.wait()
        else:
            session.plan(call)
            if (untouched := _UNTOUCHED.get(model)) is not None:
                session.learn_measured(untouched, untouched=True)
    except BaseException:
        session.close()
        uninstall(model)
        if before is not None:
            install(before)
        raise
    session.surroundings.note_compiled(model)
    if earlier is not None:
        earlier.close()
    return model


def revert(model: M) -> M:
    """The same model as it was before `optimize`; unchanged if it was not optimized."""
    session = session_of(model)
    if session is not None:
        session.close()
    forget(model)
    uninstall(model)
    return model


def report(model: nn.Module) -> Report:
    """The report of the plan in force.

    Raises:
        PlanError: the model is not optimized, or has not planned yet.
    """
    session = session_of(model)
    if session is None:
        raise PlanError(
            "this model is not optimized: call actckpt.optimize(model, budget_gb) first"
        )
    return session.report()


def measure(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    target: Any = None,
    optimizer: Optimizers = None,
    steps: int = 3,
) -> Measurement:
    """Peak memory and time of real training steps, planned or not.

    Weights, buffers, gradients, optimizer state and random states are put back. What was measured
    also goes into the model's `report`: measured before `optimize`, as the baseline.

    Args:
        steps: timed steps, at least 1.
        batch, loss_fn, target, optimizer: as for `optimize`.

    Raises:
        ValueError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; found {steps}")
    session = session_of(model)
    accumulate = session.accumulate if session is not None else False
    call, entry = _call(model, batch, loss_fn)
    optimizers = _optimizers(model, optimizer)
    step = Step(call, loss_fn, target, optimizers, accumulate, entry=entry,
                backwards=session.backwards if session is not None else ())  # fmt: skip
    measurement = measure_step(model, step, steps)
    if session is not None:
        session.learn_measured(measurement)
    else:
        _UNTOUCHED[model] = measurement
    return measurement


def trace(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    target: Any = None,
    optimizer: Optimizers = None,
) -> Graph:
    """One training step of the untouched model as a `Graph`, traced on fake tensors.

    Args:
        batch, loss_fn, target, optimizer: as for `optimize`.

    Raises:
        TraceError: the forward depends on values of activations, or there is nothing to train.
    """
    optimizers = _optimizers(model, optimizer)
    call, entry = _call(model, batch, loss_fn)
    before = uninstall(model)
    try:
        step = Step(call, loss_fn, target, optimizers, entry=entry)
        graph = trace_step(model, step)
        tell_untraced(graph)
        return graph
    finally:
        if before is not None:
            install(before)


def find_max_batch(
    model: nn.Module,
    budget_gb: float,
    make_batch: Callable[[int], Any],
    *,
    make_target: Callable[[int], Any] | None = None,
    loss_fn: LossFn | None = None,
    optimizer: Optimizers = None,
    accumulate: bool = False,
    policy: str | Policy = "auto",
    scope: str = "step",
    start: int = 1,
    limit: int = MAX_BATCH,
) -> BatchSearch:
    """The largest batch that fits, and the predicted samples per second of each size tried.

    By planning alone: no step is run, the model stays as it is. The fastest batch need not be the
    largest, which may recompute more.

    Args:
        budget_gb: as for `optimize`, and not None.
        make_batch: batch size -> batch, in any form that `optimize` takes.
        make_target: batch size -> ``target``, where ``loss_fn`` takes one.
        start: first batch size to try, at least 1.
        limit: largest batch size to try.
        loss_fn, optimizer, accumulate, policy, scope: as for `optimize`.

    Raises:
        BudgetError: not even ``start`` fits.
        PlanError, TraceError: as `optimize`.
        ValueError: ``start`` or ``limit`` is no batch size.
    """
    request = Request(_budget_bytes(budget_gb, policy), _policy(policy), _scope(scope))
    if request.budget_bytes is None:
        raise BudgetError("find_max_batch needs a budget in GB; found budget_gb=None")
    if not 1 <= start <= limit:
        raise ValueError(f"start and limit must be 1 <= start <= limit; found {start} and {limit}")
    _refuse_loss(model, loss_fn)
    optimizers = _optimizers(model, optimizer)
    before = uninstall(model)

    def attempt(size: int) -> BatchTried:
        target = make_target(size) if make_target is not None else None
        call, entry = _call(model, make_batch(size), loss_fn)
        step = Step(call, loss_fn, target, optimizers, accumulate, entry=entry)
        try:
            planned = make_plan(model, step, request)
        except BudgetError as error:
            if size == start or error.smallest_bytes is None:
                raise
            return BatchTried(size, False, error.smallest_bytes)
        peak = planned.dry.peak_bytes if scope == "step" else planned.dry.added_bytes
        if size == start:
            tell_untraced(planned.graph)
        plan = planned.plan
        regions = sum(1 for _ in (*plan.walk(), *plan.walk_bursts()))
        return BatchTried(size, True, peak, planned.price.time_s, regions)

    try:
        _refuse(model)
        return search(attempt, start, limit)
    finally:
        if before is not None:
            install(before)


def _budget_bytes(budget_gb: float | None, policy: str | Policy) -> int | None:
    if budget_gb is None:
        if policy == "auto":
            raise BudgetError(
                "budget_gb=None applies a policy without a bound, and policy 'auto' needs one: "
                "pass a budget in GB, or a policy such as 'full'"
            )
        return None
    if isinstance(budget_gb, bool) or not isinstance(budget_gb, (int, float, np.number)):
        raise BudgetError(
            f"budget_gb must be a number of GB (10^9 bytes); found {budget_gb!r}. "
            "On the command line units are accepted, as in --budget-gb 8GiB"
        )
    budget = float(budget_gb)
    if not math.isfinite(budget) or budget <= 0:
        raise BudgetError(f"budget_gb must be positive and finite; found {budget_gb!r}")
    return round(budget * 1e9)


def _optimizers(model: nn.Module, given: Optimizers) -> tuple[Optimizing, ...]:
    found = optimizers_of(given)
    for one in found:
        refuse_strange(one.optimizer, model)
    return found


def _policy(policy: str | Policy) -> str | Policy:
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise PlanError(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
    elif not callable(policy):
        raise PlanError(
            "policy must be a name or a callable (graph, profile, budget_bytes) -> Plan; "
            f"found {type(policy).__name__}"
        )
    return policy


def _scope(scope: str) -> str:
    if scope not in SCOPES:
        raise PlanError(f"no scope {scope!r}; there are {' and '.join(map(repr, SCOPES))}")
    return scope


def _call(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> tuple[Call, str]:
    """The call that a batch stands for, and the method of the model that it calls."""
    if loss_fn is None and is_lightning(model):
        return training_call(model, batch), TRAINING_STEP
    return Call.of(batch), FORWARD


def _refuse_loss(model: nn.Module, loss_fn: LossFn | None) -> None:
    """A LightningModule's ``training_step`` is what is planned for a batch."""
    if loss_fn is not None and is_lightning(model):
        raise PlanError(
            f"{type(model).__name__} is a LightningModule, and its training_step makes the loss: "
            "leave loss_fn and target out, and pass as batch what its loader gives. For a loop of "
            "your own that calls the module itself, optimize the module inside"
        )


def _refuse(model: nn.Module) -> None:
    """Models that no plan can be made for."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise PlanError(
            f"{type(model).__name__} wraps the model that is to be planned: "
            "call actckpt.optimize on the inner module first, then wrap it"
        )
    if is_compiler_wrapper(model):
        raise PlanError(
            "this is what torch.compile has made of a model, and plans are for eager models: call "
            "actckpt.optimize on the model inside (model._orig_mod). It runs as planned, and "
            "nothing of it is compiled; or leave actckpt out and train it compiled"
        )
    refuse_shared(model)
    if is_lightning(model):
        refuse_manual(model)
    model_device(model)
