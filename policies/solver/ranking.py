"""Which results of a call to keep: the most seconds of recomputation per byte first."""

from __future__ import annotations

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region
from actckpt.data.profile import Profile
from actckpt.interpreting.regions import place, replay_of

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)


def ranked(graph: Graph, profile: Profile, whole: Region) -> list[frozenset[int]]:
    """Operations to keep so that ever larger shares of a region's replay are not run again.

    Beside the minimum cuts, which take results for interchangeable where an operation changes them
    in place.
    """
    order = _by_worth(graph, profile, whole)
    total = sum(seconds for _, seconds in order)
    found: list[frozenset[int]] = []
    chosen: set[int] = set()
    covered = 0.0
    shares = list(SHARES)
    for op, seconds in order:
        chosen.add(op)
        covered += seconds
        if shares and covered >= shares[0] * total:
            shares = [share for share in shares if covered < share * total]
            found.append(frozenset(chosen))
    return found


def _by_worth(graph: Graph, profile: Profile, whole: Region) -> list[tuple[int, float]]:
    """(operation, seconds that its replay takes), most seconds per byte of its result first."""
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
    order = sorted(found, key=lambda f: (-f[1] / f[2], f[0]))
    return [(index, seconds) for index, seconds, _ in order]
