"""No recomputation: what PyTorch does by itself."""

from __future__ import annotations

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile


def none(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The plan without regions. Everything that autograd saves stays saved."""
    return Plan("none")
