"""Planning for steps that run several backwards over one graph."""

from __future__ import annotations

import dataclasses

from actckpt.data.graph import Graph, Phase
from actckpt.data.profile import Profile
from actckpt.planning.dry_run import DryRun
from actckpt.pricing.price import Price
from actckpt.tracing.step import Step


def single(step: Step) -> Step:
    """The step with one backward: the last of several, which finds the gradients of the others.

    Policies plan for that one. What the others hold beyond it shows in the dry run, which runs
    them all, and a plan that does not fit there is made again for less.
    """
    resident = any(b.into_grad for b in step.backwards[:-1])
    return dataclasses.replace(step, backwards=(), accumulate=step.accumulate or resident)


def priced(price: Price, step: Step, graph: Graph, profile: Profile, dry: DryRun) -> Price:
    """The price of a plan for ``step``, of which ``graph`` has one backward.

    Each further backward takes as long as that one and recomputes as much, and so does each way
    back through a graph of gradients, for which the same is recomputed; the peak is as dry-run.
    """
    if not step.backwards:
        return price
    more = len(step.backwards) - (not step.backwards[-1].second_order)
    more += sum(b.second_order for b in step.backwards)
    costs = (profile.costs[op.signature] for op in graph.ops if op.phase is Phase.BACKWARD)
    once_s = sum(c.time_s for c in costs) + sum(price.region_s)
    return dataclasses.replace(
        price,
        peak_bytes=dry.peak_bytes,
        added_bytes=dry.added_bytes,
        time_s=price.time_s + more * once_s,
    )


def notes_on(step: Step) -> tuple[str, ...]:
    """What a report says about the backwards that a step was planned with."""
    if not step.backwards:
        return ()
    second = sum(b.second_order for b in step.backwards)
    count = len(step.backwards) + step.backwards[-1].second_order
    found = (
        f"planned for {count} backwards over one graph"
        if count > 1
        else ("planned for a backward that keeps its graph")
    )
    if second:
        found += (
            ", of which one differentiates gradients: the sum of their squares stands in for what "
            "the step makes of them, and memory that this takes beyond is not bounded"
        )
    return (found + " (as steps were seen to run; pass loss_fn to plan before the first one)",)
