"""Regions in regions: logarithmic memory (Chen et al. 2016; treeverse, Griewank & Walther)."""

from __future__ import annotations

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region
from actckpt.data.profile import Profile
from actckpt.policies.blocks import blocks, chains, region
from actckpt.policies.last_region import spare_last_region


def log(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """Each chain of n linked blocks halved again and again.

    Memory O(log n) block inputs plus one block's activations, time O(n log n).

    References:
        Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 4.3.
        Griewank & Walther 2000, Algorithm 799: revolve.
    """
    regions: list[Region] = []
    for chain in chains(graph, blocks(graph)):
        regions.extend(halves(graph, chain))
    return spare_last_region(graph, profile, Plan("log", tuple(regions)))


def halves(graph: Graph, chain: tuple[int, ...]) -> list[Region]:
    """The right spine of the binary tree over ``chain``: a half, a quarter, …, the last block.

    Backward reaches the end of the chain first, so a region over the whole of it would only be
    recomputed at once.
    """
    regions: list[Region] = []
    while len(chain) > 1:
        middle = len(chain) // 2
        regions += trees(graph, chain[:middle])
        chain = chain[middle:]
    return [*regions, *trees(graph, chain)]


def trees(graph: Graph, part: tuple[int, ...]) -> list[Region]:
    """A region over part of a chain whose two halves are regions inside it, down to single blocks.

    Several where the part is no chain: branches that read the same without what makes it.
    """
    found = []
    for run in chains(graph, part):
        middle = len(run) // 2
        inside = [*trees(graph, run[:middle]), *trees(graph, run[middle:])] if middle else []
        found.append(region(graph, run[0], run[-1], *inside))
    return found
