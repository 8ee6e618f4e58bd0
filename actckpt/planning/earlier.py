"""Plans that were made before, by this process or another one, and still are the ones."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.errors import PlanError, ReplayError
from actckpt.planning.choosing import choose_plan
from actckpt.planning.plan_key import plan_key
from actckpt.planning.request import BY_ITSELF, Planned, Recalled, Request, Verbatim
from actckpt.planning.room import NO_OTHERS
from actckpt.planning.same_forward import grows_residents
from actckpt.planning.search import search_for
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")


def recalled_plan(
    model: nn.Module, step: Step, request: Request, graph: Graph, recalled: Sequence[Recalled]
) -> Planned | None:
    """The plan that was made for this very graph, if it still fits."""
    key = plan_key(graph) if recalled else ""
    for earlier in recalled:
        if earlier.key != key:
            continue
        verbatim = dataclasses.replace(request, policy=Verbatim(earlier.plan), effort=None)
        try:
            return choose_plan(model, step, verbatim, graph, earlier.profile)
        except (BudgetError, PlanError, ReplayError) as error:
            logger.warning("actckpt: the earlier plan cannot be used, planning again: %s", error)
    return None


def kept_plan(
    model: nn.Module,
    step: Step,
    request: Request,
    graph: Graph,
    profile: Profile,
    earlier: Planned,
) -> Planned | None:
    """An earlier plan, if it was made for the same forward with no more resident, and still fits.

    Whatever fits now did so then, and the earlier one was the fastest: it still is.
    """
    if request.policy not in BY_ITSELF or request.budget_bytes is None or step.backwards:
        return None
    if not grows_residents(earlier.graph, graph):
        return None
    search = search_for(model, step, request, graph, profile, NO_OTHERS)
    most = math.floor(request.budget_bytes * search.aim)
    if search.predicted_bytes(earlier.plan) > most:
        return None
    planned = search.dry(earlier.plan)
    fits = search.peak_bytes(planned) <= most and not planned.dry.diverged
    return planned if fits else None
