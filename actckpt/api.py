"""The public functions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from actckpt.asked import request_of
from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.errors import ArgumentError, PlanError
from actckpt.measuring import measure_step
from actckpt.planning.batch_search import MAX_BATCH, BatchSearch, BatchTried, search
from actckpt.planning.making import make_plan
from actckpt.planning.request import Request
from actckpt.policies import Policy
from actckpt.profiler.memory_size import memory_bytes
from actckpt.refusals import (
    refuse_inference_mode,
    refuse_loss,
    refuse_loss_beside_training_step,
    refuse_model,
    refuse_untraceable,
)
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.rewriting.installing import install, installed, uninstall
from actckpt.session.in_use import refuse_strange
from actckpt.session.optimizer_watch import tell_untraced
from actckpt.session.reverting import take_off
from actckpt.session.session import Session, session_of
from actckpt.tracing.call import Call, LossFn
from actckpt.tracing.forwards import FORWARD
from actckpt.tracing.lightning import TRAINING_STEP, is_lightning, training_call
from actckpt.tracing.optimizing import Optimizing, optimizers_of
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import model_device, trace_step

M = TypeVar("M", bound=nn.Module)
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None

# what an untouched model was measured at, for the report of the plan that it gets later
_UNTOUCHED: weakref.WeakKeyDictionary[nn.Module, Measurement] = weakref.WeakKeyDictionary()


def optimize(
    model: M,
    budget_gb: float | str | None,
    *,
    batch: Any = None,
    loss_fn: LossFn | None = None,
    target: Any = None,
    optimizer: Optimizers = None,
    accumulate: bool = False,
    policy: str | Policy = "auto",
    effort: float | None = None,
    scope: str = "step",
) -> M:
    """The same model, changed in place so that a training step stays within a budget.

    Outputs, gradients, buffers and random states stay bitwise the same. If the untouched model
    fits, nothing is recomputed. Calling it again replaces the plan; `revert` takes it off.

    Args:
        budget_gb: bound in GB (10^9 bytes), positive; or a size with its unit ("8GB", "8GiB",
            "512MB"), or a share ("80%") of the memory of the model's device: on a CPU of the limit
            that its container or batch system sets, else of the machine's. None applies a named
            policy without a bound.
        batch: a tensor (one positional argument), a tuple (positional), a dict (keyword) or a
            `Call`. None plans on the first forward with gradients, from its arguments. Of a
            LightningModule ``training_step`` is planned: what its loader gives, in any nesting.
        loss_fn: ``loss_fn(output)``, or ``loss_fn(output, target)`` when ``target`` is given,
            returning a scalar. By default the output's ``.loss``, ``["loss"]``, or itself if it is
            a scalar; else backward is taken to start from the outputs.
        optimizer: one, or a list of several: their state and their steps count, also before the
            first. Where none is given, one that exists when the plan is made and holds trained
            parameters is taken. Others are learned from their first step, and planned again.
        accumulate: gradients are resident when a step begins.
        policy: a name in `POLICIES`, or a callable ``(graph, profile, budget_bytes) -> Plan``.
        effort: how long "auto", "optimal" and "calls" look for a faster plan once they have one,
            from 0 (not at all) to 20. None is 1: some seconds, whatever the budget. Counted in
            work, not by a clock: the plan is the same on a busy machine.
        scope: "step" bounds the peak of allocated device memory over the whole step,
            "activations" what the step adds to parameters, gradients, optimizer state and batch.

    Raises:
        BudgetError: no plan of the policy fits, or the budget is none.
        ArgumentError: model, loss_fn, target, optimizer or effort is not what it must be.
        PlanError: the model cannot be planned for, or the policy's plan is malformed.
        TraceError: the training step cannot be traced.
        Exception: whatever the model raises for this batch. After any error the model is as it
            was before the call.
    """
    refuse_model(model)
    request = _request(model, budget_gb, policy, effort, scope)
    refuse_loss(loss_fn, target is not None)
    call = None
    if batch is not None:
        refuse_inference_mode()
        refuse_loss_beside_training_step(model, loss_fn)
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
    take_off(model)
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
        batch: as for `optimize`.
        loss_fn: as for `optimize`.
        target: as for `optimize`.
        optimizer: as for `optimize`.

    Raises:
        ArgumentError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1; found {steps}")
    _refuse_step(model, loss_fn, target)
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
        batch: as for `optimize`.
        loss_fn: as for `optimize`.
        target: as for `optimize`.
        optimizer: as for `optimize`.

    Raises:
        TraceError: the forward depends on values of activations, or there is nothing to train.
    """
    _refuse_step(model, loss_fn, target)
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
    budget_gb: float | str,
    make_batch: Callable[[int], Any],
    *,
    make_target: Callable[[int], Any] | None = None,
    loss_fn: LossFn | None = None,
    optimizer: Optimizers = None,
    accumulate: bool = False,
    policy: str | Policy = "auto",
    effort: float | None = None,
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
        loss_fn: as for `optimize`.
        optimizer: as for `optimize`.
        accumulate: as for `optimize`.
        policy: as for `optimize`.
        effort: as for `optimize`.
        scope: as for `optimize`.

    Raises:
        BudgetError: not even ``start`` fits.
        PlanError, TraceError: as `optimize`.
        ArgumentError: ``start`` or ``limit`` is no batch size.
    """
    refuse_model(model)
    request = _request(model, budget_gb, policy, effort, scope)
    if request.budget_bytes is None:
        raise BudgetError("find_max_batch needs a budget in GB; found budget_gb=None")
    if not 1 <= start <= limit:
        raise ArgumentError(
            f"start and limit must be 1 <= start <= limit; found {start} and {limit}"
        )
    refuse_inference_mode()
    refuse_loss(loss_fn, make_target is not None, target="make_target")
    refuse_loss_beside_training_step(model, loss_fn)
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
        return search(attempt, start, limit)
    finally:
        if before is not None:
            install(before)


def _request(
    model: nn.Module,
    budget_gb: float | str | None,
    policy: str | Policy,
    effort: float | None,
    scope: str,
) -> Request:
    return request_of(budget_gb, policy, scope, lambda: memory_bytes(model_device(model)), effort)


def _optimizers(model: nn.Module, given: Optimizers) -> tuple[Optimizing, ...]:
    found = optimizers_of(given)
    for one in found:
        refuse_strange(one.optimizer, model)
    return found


def _call(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> tuple[Call, str]:
    """The call that a batch stands for, and the method of the model that it calls."""
    if loss_fn is None and is_lightning(model):
        return training_call(model, batch), TRAINING_STEP
    return Call.of(batch), FORWARD


def _refuse_step(model: nn.Module, loss_fn: LossFn | None, target: Any) -> None:
    refuse_untraceable(model)
    refuse_inference_mode()
    refuse_loss(loss_fn, target is not None)
