"""Backward reaches the last region first: recomputing it takes time and may save nothing."""

from __future__ import annotations

import dataclasses

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.pricing.simulate import Pricer


def spare_last_region(graph: Graph, profile: Profile, plan: Plan) -> Plan:
    """``plan`` without its last region, if that raises the peak by no byte; else ``plan``.

    References:
        Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 4.1: the last
        segment is run with its results kept.
    """
    if not plan.regions:
        return plan
    shorter = dataclasses.replace(plan, regions=plan.regions[:-1])
    pricer = Pricer(graph, profile)
    found, without = pricer.estimate(plan), pricer.estimate(shorter)
    spared = without.peak_bytes <= found.peak_bytes and without.added_bytes <= found.added_bytes
    return shorter if spared else plan
