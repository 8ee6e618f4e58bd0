"""About the square root of n regions of consecutive blocks (Chen et al. 2016)."""

from __future__ import annotations

import math
from itertools import pairwise

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region
from actckpt.data.profile import Profile
from actckpt.policies.blocks import blocks, chains, region
from actckpt.policies.last_region import spare_last_region


def sqrt(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """Each chain of n linked blocks in about sqrt(n) regions of equal length.

    Memory O(sqrt(n)) where a block saves about as much as its input, time one more forward. Blocks
    that are not linked to their neighbours are regions of their own.

    References:
        Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 4.2.
    """
    regions: list[Region] = []
    for chain in chains(graph, blocks(graph)):
        regions.extend(segments(graph, chain, round(math.sqrt(len(chain)))))
    return spare_last_region(graph, profile, Plan("sqrt", tuple(regions)))


def segments(graph: Graph, chain: tuple[int, ...], count: int) -> list[Region]:
    """``chain`` in ``count`` regions whose lengths differ by at most one, longer ones last.

    More of them where a part is no chain: branches that read the same without what makes it.
    """
    count = max(1, min(count, len(chain)))
    cuts = [i * len(chain) // count for i in range(count + 1)]
    return [
        region(graph, run[0], run[-1])
        for a, b in pairwise(cuts)
        for run in chains(graph, chain[a:b])
    ]
