"""Every block a region: what torch.utils.checkpoint on every layer does."""

from __future__ import annotations

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.policies.blocks import blocks, region


def full(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """Each block recomputed as a whole; only the blocks' inputs are saved.

    Memory O(n) block inputs plus one block's activations, time one more forward.

    References:
        Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 4.1.
    """
    return Plan("full", tuple(region(graph, b) for b in blocks(graph)))
