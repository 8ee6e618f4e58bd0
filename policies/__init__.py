"""Who decides what is recomputed: one algorithm per file, all of one shape.

A policy is a callable ``(graph, profile, budget_bytes) -> Plan``.
"""

from __future__ import annotations

from collections.abc import Callable

from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.policies.auto import auto
from actckpt.policies.by_calls import by_calls
from actckpt.policies.full import full
from actckpt.policies.log import log
from actckpt.policies.none import none
from actckpt.policies.optimal import optimal
from actckpt.policies.selective import Selective
from actckpt.policies.sqrt import sqrt
from actckpt.profile import Profile

Policy = Callable[[Graph, Profile, int | None], Plan]

POLICIES: dict[str, Policy] = {
    "none": none,
    "full": full,
    "sqrt": sqrt,
    "log": log,
    "selective": Selective(),
    "calls": by_calls,
    "optimal": optimal,
    "auto": auto,
}
