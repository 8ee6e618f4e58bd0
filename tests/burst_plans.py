"""Plans by operations made by hand or drawn, for the tests of the engine."""

from __future__ import annotations

import random

from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan
from actckpt.interpreting.recomputation import Recomputation
from tests.exact import MakePlan


def everything(graph: Graph) -> Plan:
    """One burst that makes again all that can be dropped."""
    return grouped(graph, [sorted(Recomputation(graph).saves)])


def from_the_batch(graph: Graph) -> Plan:
    """As `everything`, pinning no activation at all: the whole forward runs again."""
    possible = Recomputation(graph)
    drops = sorted(possible.saves)
    found = possible.closure(drops, lambda s: False)
    assert found is not None
    saves = tuple(sorted(k for s in drops for k in possible.saves[s]))
    return Plan("by hand", bursts=(Burst(found[0], saves),))


def grouped(graph: Graph, groups: list[list[int]]) -> Plan:
    """A burst for each group of dropped storages, reading whatever no burst drops."""
    possible = Recomputation(graph)
    dropped = {s for group in groups for s in group}
    bursts = [burst_of(possible, group, dropped) for group in groups if group]
    return Plan("by hand", bursts=tuple(b for b in bursts if b is not None))


def made_under(*paths: str) -> MakePlan:
    """What modules of these paths make and autograd saves is dropped, all in one burst each."""

    def make(graph: Graph) -> Plan:
        possible = Recomputation(graph)
        groups = [
            [
                s
                for s in sorted(possible.saves)
                if graph.stages[graph.ops[possible.makers[s][0]].stage].path.startswith(path)
            ]
            for path in paths
        ]
        assert all(groups)
        return grouped(graph, groups)

    return make


def burst_of(
    possible: Recomputation,
    drops: list[int],
    dropped: set[int],
    handed: frozenset[int] = frozenset(),
    *inner: Burst,
) -> Burst | None:
    """The burst that makes ``drops`` again, reading nothing of ``dropped`` but what is handed."""
    found = possible.closure(drops, lambda s: s not in dropped, handed)
    if found is None:
        return None
    return Burst(found[0], tuple(sorted(k for s in drops for k in possible.saves[s])), inner)


def each_alone(graph: Graph) -> Plan:
    """Every droppable storage in a burst of its own, made again from the start."""
    return grouped(graph, [[s] for s in sorted(Recomputation(graph).saves)])


def drawn(seed: int, depth: int = 2) -> MakePlan:
    """Some storages dropped, in random groups, some of them inside others."""

    def make(graph: Graph) -> Plan:
        draw = random.Random(seed)
        possible = Recomputation(graph)
        chosen = [s for s in sorted(possible.saves) if draw.random() < 0.8]
        dropped = set(chosen)
        groups: list[list[int]] = [[] for _ in range(draw.randint(1, 4))]
        for s in chosen:
            draw.choice(groups).append(s)
        bursts = [nested(possible, group, dropped, draw, depth) for group in groups if group]
        return Plan("drawn", bursts=tuple(b for b in bursts if b is not None))

    return make


def nested(
    possible: Recomputation,
    drops: list[int],
    dropped: set[int],
    draw: random.Random,
    depth: int,
    handed: frozenset[int] = frozenset(),
) -> Burst | None:
    """A burst for the first of ``drops``, and inside it one for the others, from its results."""
    cut = draw.randint(1, len(drops)) if depth else len(drops)
    own, rest = drops[:cut], drops[cut:]
    burst = burst_of(possible, own, dropped, handed)
    if burst is None or not rest:
        return burst
    made = frozenset(own) | handed
    child = nested(possible, rest, dropped, draw, depth - 1, made)
    return burst if child is None else Burst(burst.ops, burst.drops, (child,))
