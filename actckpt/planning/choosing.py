"""From a graph and its profile to a plan that was seen to fit."""

from __future__ import annotations

import logging

from torch import nn

from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.errors import PlanError, ReplayError
from actckpt.planning.request import BY_OPERATIONS, Planned, Request
from actckpt.planning.room import NO_OTHERS, Room
from actckpt.planning.search import search_for, without_residents
from actckpt.policies.solver.bound import Bound, lower_bound
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")


def choose_plan(
    model: nn.Module,
    step: Step,
    request: Request,
    graph: Graph,
    profile: Profile,
    room: Room = NO_OTHERS,
) -> Planned:
    """As `making.make_plan`, for a graph and profile that exist already."""
    search = search_for(model, step, request, graph, profile, room)
    try:
        planned = search.run()
    except ReplayError as error:
        if request.policy not in BY_OPERATIONS:
            raise
        reason = f"its dry run failed: {error}"
    else:
        if not planned.dry.diverged:
            return planned
        reason = f"a second run of the forward is not as the traced one: {planned.dry.diverged}"
        if request.policy not in BY_OPERATIONS:
            raise PlanError(f"the plan recomputes by operations, and {reason}")
    logger.info("actckpt: recomputing by calls: %s", reason)
    search.request = request.by_calls
    return search.run()


def bound_of(planned: Planned, request: Request) -> Bound | None:
    """What no plan for the same request can beat; None where it has no budget."""
    if request.budget_bytes is None:
        return None
    graph = planned.graph if request.scope == "step" else without_residents(planned.graph)
    return lower_bound(graph, planned.profile, request.budget_bytes)
