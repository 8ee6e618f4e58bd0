"""Ways to recompute one block: which of its expensive results stay resident."""

from __future__ import annotations

from collections.abc import Iterator

from actckpt.graph import Graph
from actckpt.plan import Plan, Region
from actckpt.policies.blocks import chains, opened, region
from actckpt.policies.selective import saved_ops
from actckpt.profile import Profile
from actckpt.regions import place, replay_of

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
LENGTHS = (2, 3, 4, 6, 8, 12, 16)
SHORT = 8


def options(graph: Graph, profile: Profile, stage: int) -> tuple[Region, ...]:
    """Regions for one block, from saving nothing inside to saving most.

    Operations are ranked by seconds of recomputation per saved byte. The last options recompute
    the calls inside the block one by one, within the block and instead of it, which lowers the
    peak of the recomputation.
    """
    whole = region(graph, stage)
    found = [whole]
    ranked = _ranked(graph, profile, whole)
    total = sum(seconds for _, seconds, _ in ranked)
    chosen: list[int] = []
    covered = 0.0
    shares = list(SHARES)
    s = graph.stages[stage]
    for op, seconds, _ in ranked:
        chosen.append(op)
        covered += seconds
        if total and shares and covered >= shares[0] * total:
            while shares and covered >= shares[0] * total:
                shares.pop(0)
            saved = saved_ops(graph, s.first, s.last, frozenset(chosen))
            found.append(Region(whole.first, whole.last, (), saved))
    inner = tuple(region(graph, child) for child in opened(graph, stage))
    if inner:
        found.append(Region(whole.first, whole.last, inner))
    return tuple(found)


def spans(
    graph: Graph, stages: tuple[int, ...], longest: int
) -> Iterator[tuple[tuple[int, ...], Region]]:
    """Regions of several linked stages, nothing saved inside, with the stages that each takes.

    In a short chain they begin everywhere, in a long one of n at multiples of their length: n log n
    of them instead of n squared.
    """
    for chain in chains(graph, stages):
        for length in LENGTHS:
            if length > min(longest, len(chain)):
                break
            step = 1 if len(chain) <= SHORT else length
            for start in range(0, len(chain) - length + 1, step):
                taken = chain[start : start + length]
                yield taken, region(graph, taken[0], taken[-1])


def _ranked(graph: Graph, profile: Profile, whole: Region) -> list[tuple[int, float, int]]:
    """(operation, seconds that its replay takes, bytes of its result), most worthwhile first."""
    (placed,) = place(graph, Plan("", (whole,)))
    replay = replay_of(graph, placed)
    found = []
    for index in replay.ops:
        op = graph.ops[index]
        made = {graph.values[v].storage for v in op.outputs}
        made = {sid for sid in made if graph.storages[sid].born == index}
        if op.view or not made or index not in replay.needed:
            continue
        size = sum(graph.storages[sid].bytes for sid in made)
        seconds = profile.costs[op.signature].time_s
        if size and seconds:
            found.append((index, seconds, size))
    return sorted(found, key=lambda f: (-f[1] / f[2], f[0]))
