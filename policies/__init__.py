"""Who decides what is recomputed: one algorithm per file, all of one shape.

A policy is a callable ``(graph, profile, budget_bytes) -> Plan``.
"""

from __future__ import annotations

from collections.abc import Callable

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.policies.auto import Auto
from actckpt.policies.by_calls import ByCalls
from actckpt.policies.full import full
from actckpt.policies.log import log
from actckpt.policies.none import none
from actckpt.policies.optimal import Optimal
from actckpt.policies.rotor import rotor
from actckpt.policies.selective import Selective
from actckpt.policies.sqrt import sqrt

Policy = Callable[[Graph, Profile, int | None], Plan]

POLICIES: dict[str, Policy] = {
    "none": none,
    "full": full,
    "sqrt": sqrt,
    "log": log,
    "selective": Selective(),
    "rotor": rotor,
    "calls": ByCalls(),
    "optimal": Optimal(),
    "auto": Auto(),
}

# those that go on looking for a faster plan as long as they may: each has a field ``effort``
SEARCHES: dict[str, type[Auto] | type[ByCalls] | type[Optimal]] = {
    "calls": ByCalls,
    "optimal": Optimal,
    "auto": Auto,
}
