"""The error for a budget that nothing fits: what the smallest plan needs, of what, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.planning.own_backward import note_on_backward, ran_in_backward
from actckpt.planning.request import Planned, Request
from actckpt.planning.room import Room
from actckpt.policies.solver.bound import lower_bound, smallest_peak
from actckpt.pricing.price import Price

_MARGIN = "margin"
_OTHERS = "other forwards"


@dataclass(frozen=True, slots=True)
class Smallest:
    """The smallest plan that a search has found.

    Attributes:
        view: the graph with what the request bounds.
        peak_bytes: what the request bounds, as dry-run.
        aim: share of the budget that plans are made for.
    """

    planned: Planned
    view: Graph
    peak_bytes: int
    aim: float


def too_small(request: Request, smallest: Smallest, room: Room) -> BudgetError:
    """The error for a request, with what the smallest plan of its policy needs."""
    planned, view = smallest.planned, smallest.view
    budget, unit = request.budget_bytes, request.unit
    assert budget is not None
    needed = math.ceil(smallest.peak_bytes / smallest.aim) + 1
    parts = planned.dry.split(request.scope)
    if room:
        parts[_OTHERS] = smallest.peak_bytes - sum(parts.values())
    # a plan aims below its budget
    parts[_MARGIN] = needed - sum(parts.values())
    parts = dict(sorted(parts.items(), key=lambda x: -x[1]))
    split = ", ".join(
        f"{name} {size}"
        for name, size in zip(parts, unit.split(needed, parts.values()), strict=True)
    )
    what = "step" if request.scope == "step" else "activations of a step"
    excluded, why = smallest_peak(view, planned.profile)
    if budget >= excluded:
        # no instant excludes it alone, all of them together may
        bound = lower_bound(view, planned.profile, budget)
        if not bound.possible:
            excluded, why = budget + 1, bound.certificate
    verdict = (
        f"No recomputation plan can fit: {why}"
        if budget < excluded
        else f"What no plan of any policy can go below is {unit.text(excluded)}"
    )
    beside = request.beside_bytes
    taken = f", after {unit.text(beside)} beside the model were taken off," if beside else ""
    return BudgetError(
        f"budget {unit.text(budget)}{taken} is below the {unit.text(needed)} that "
        f"the {what} needs under the smallest plan of policy {request.policy_name!r} "
        f"({unit.name} at its peak: {split}; reached {_where(planned.graph, planned.price)}). "
        f"Raise budget_gb to {unit.argument(needed + beside)}, or make the batch smaller. "
        f"{verdict}{_on_backward(planned.graph)}",
        budget_bytes=budget,
        smallest_bytes=needed,
        excluded_bytes=excluded,
        smallest_plan=planned.plan,
        split=parts,
    )


def _on_backward(graph: Graph) -> str:
    note = note_on_backward(graph)
    return f". Note: {note}" if note else ""


def _where(graph: Graph, price: Price) -> str:
    """Where in the step a peak is: the module, or what dominates outside of the modules."""
    if not graph.ops:
        return "nowhere"
    op = graph.ops[price.peak_at]
    if ran_in_backward(graph, op):
        return f"in a forward that the backward runs ({op.name})"
    owner = graph.ops[op.owner] if op.owner >= 0 else op
    if op.phase == "optimizer":
        return "in the optimizer's step"
    path = graph.stages[owner.stage].path if owner.stage >= 0 else ""
    if path:
        return f"at {path} in the {op.phase} pass"
    return f"at the loss ({op.name}, {op.phase} pass)"
