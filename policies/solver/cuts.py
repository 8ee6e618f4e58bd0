"""What to keep of a span of operations that may run again one by one: the best trades."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actckpt.data.profile import Profile
from actckpt.interpreting.recomputation import Recomputation
from actckpt.policies.solver.cut_program import CutProgram, Row
from actckpt.policies.solver.hull import lower_hull


@dataclass(frozen=True, slots=True)
class Cut:
    """Activations that stay, their bytes, the seconds of making again the rest that is needed."""

    kept: frozenset[int]
    bytes: int
    time_s: float


def cuts(possible: Recomputation, profile: Profile, first: int, last: int) -> list[Cut]:
    """The lower convex hull of (bytes kept, seconds of recomputation), fewest bytes first.

    As `actckpt.policies.solver.mincut.trades`, for operations that run again one by one: a result
    may stay wherever a run can get hold of it, whether autograd saves it or not, and only random
    operations of the same function call depend on each other. A linear program with a totally
    unimodular matrix per point of the hull.

    Args:
        first, last: operations ``[first, last)`` of the forward pass.
    """
    problem = _Problem(possible, profile, first, last)
    if not problem.needed:
        return []
    # at that price nothing is kept that need not be
    least = problem.solve(1.0)
    most = Cut(frozenset(problem.needed), sum(problem.size[s] for s in problem.needed), 0.0)
    return [most] if least is None else lower_hull(least, most, problem.solve)


class _Problem:
    """Columns: keep each activation made in the span, run each operation of it again."""

    def __init__(self, possible: Recomputation, profile: Profile, first: int, last: int) -> None:
        self.possible = possible
        graph = possible.graph
        self.needed = [s for s in possible.saves if first <= graph.storages[s].born < last]
        self.storages, self.ops = possible.reachable(self.needed, first)
        count = len(self.storages)
        self.size = {s: graph.storages[s].bytes for s in self.storages}
        self.keep_of = {s: j for j, s in enumerate(self.storages)}
        self.again_of = {i: count + j for j, i in enumerate(self.ops)}
        costs = profile.costs
        stays = {s for s in self.storages if s in possible.stays}
        self.program = CutProgram(
            # what is saved in any case costs nothing
            np.array([0 if s in stays else self.size[s] for s in self.storages], dtype=float),
            np.array([costs[graph.ops[i].signature].time_s + profile.burst_op_s for i in self.ops]),
            [
                *(s in possible.saves or possible.source(s) is not None for s in self.storages),
                *(possible.can_run(i) for i in self.ops),
            ],
            [*self._made(), *self._ancestors(), *self._draws()],
        )

    def _made(self) -> Iterator[Row]:
        for sid in self.needed:
            for index in self.possible.makers[sid]:
                yield [(self.keep_of[sid], 1.0), (self.again_of[index], 1.0)], 1.0

    def _ancestors(self) -> Iterator[Row]:
        possible, graph = self.possible, self.possible.graph
        for index in self.ops:
            for sid in possible.inputs(index).union(graph.ops[index].writes):
                if sid not in self.keep_of:
                    continue
                pinned = [(self.keep_of[sid], 1.0)] if possible.can_pin(sid, index) else []
                for maker in possible.makers[sid]:
                    if maker < index:
                        yield (
                            [*pinned, (self.again_of[maker], 1.0), (self.again_of[index], -1.0)],
                            0.0,
                        )

    def _draws(self) -> Iterator[Row]:
        """Random operations of one call are drawn in order."""
        for index in self.ops:
            if self.possible.graph.ops[index].random:
                for earlier in self.possible.earlier_draws(index):
                    if earlier in self.again_of:
                        yield [(self.again_of[earlier], 1.0), (self.again_of[index], -1.0)], 0.0

    def solve(self, price: float) -> Cut | None:
        """The best choice when a kept byte costs ``price`` seconds."""
        found = self.program.best(price)
        if found is None:
            return None
        return Cut(frozenset(self.storages[j] for j in found.kept), found.bytes, found.time_s)
