"""From a model and a training step to a plan that was seen to fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.planning.choosing import choose_plan
from actckpt.planning.earlier import kept_plan, recalled_plan
from actckpt.planning.own_backward import note_on_backward
from actckpt.planning.request import Planned, Recalled, Request, Verbatim, noted
from actckpt.planning.room import NO_OTHERS, Room
from actckpt.planning.same_forward import same_forward
from actckpt.planning.traced import DRAWN, largest_drawn, traced_step
from actckpt.policies.solver.handed_on import handing_on
from actckpt.policies.solver.prepared import kept_tables
from actckpt.profiler.build import build_profile
from actckpt.progress import progress_shown, stage
from actckpt.tracing.step import Step


def make_plan(
    model: nn.Module,
    step: Step,
    request: Request,
    *,
    progress: bool | None = None,
    recalled: Sequence[Recalled] = (),
    room: Room = NO_OTHERS,
    graph: Graph | None = None,
    earlier: Sequence[Planned] = (),
) -> Planned:
    """Traces, profiles, asks the policy, and dry-runs its plan until it fits.

    The model must carry no rewrite, and is left as it was.

    Args:
        recalled: plans made earlier for the same request; one for this very graph is dry-run again
            and taken without asking the policy or measuring.
        room: what others take of the budget meanwhile.
        graph: the trace of this very step, if there is one.
        earlier: plans made for the same request that were the fastest found; one that still fits
            where only more is resident now still is, and is taken without asking the policy.

    Raises:
        BudgetError: no plan of the policy fits.
        PlanError: the policy returned something else than a plan for this model.
        TraceError: the step cannot be traced.
    """
    with progress_shown(), kept_tables():
        return _make_plan(model, step, request, recalled, room, graph, earlier, progress)


def _make_plan(
    model: nn.Module,
    step: Step,
    request: Request,
    recalled: Sequence[Recalled],
    room: Room,
    graph: Graph | None,
    earlier: Sequence[Planned],
    progress: bool | None,
) -> Planned:
    largest = None
    if graph is None:
        stage("tracing a step")
        step, graph = traced_step(model, step)
        largest = largest_drawn(model, step, graph)
    if largest is not None:
        step, graph = largest
        request = request.by_calls
    planned = recalled_plan(model, step, request, graph, () if room else recalled)
    if planned is not None:
        return planned
    profile = build_profile(graph, progress=progress)
    if not room and largest is None:
        for one in earlier:
            kept = kept_plan(model, step, request, graph, profile, one)
            if kept is not None:
                return kept
    ways = next((e.ways for e in earlier if e.ways and same_forward(e.graph, graph)), ())
    with handing_on(ways) as handed:
        planned = choose_plan(model, step, request, graph, profile, room)
    planned = dataclasses.replace(planned, ways=handed.left)
    for note in (note_on_backward(graph), DRAWN if largest is not None else ""):
        planned = noted(planned, note) if note else planned
    return planned


def make_smallest(model: nn.Module, step: Step, request: Request, error: BudgetError) -> Planned:
    """The smallest plan that an error knows of, though it does not fit; else raises the error."""
    if error.smallest_plan is None:
        raise error
    verbatim = dataclasses.replace(
        request, policy=Verbatim(error.smallest_plan), budget_bytes=None, effort=None
    )
    return make_plan(model, step, verbatim)
