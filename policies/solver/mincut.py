"""Which results of a span of operations to keep: every best trade of bytes for seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.policies.solver.cut_program import CutProgram, Row
from actckpt.policies.solver.hull import lower_hull
from actckpt.policies.solver.makers import Makers


@dataclass(frozen=True, slots=True)
class Trade:
    """Operations whose results stay, the bytes that stay, the seconds of recomputing the rest."""

    kept: frozenset[int]
    bytes: int
    time_s: float


def trades(graph: Graph, profile: Profile, first: int, last: int) -> list[Trade]:
    """The lower convex hull of (bytes kept, seconds of recomputation), fewest bytes first.

    For a price per byte, keeping or recomputing each result is a minimum cut; here as a linear
    program, whose matrix is totally unimodular but for random operations, whose draws must be
    repeated in order. Its solutions between two trades are found by the slope that joins them.

    Args:
        first, last: operations ``[first, last)`` of the forward pass.
    """
    problem = _Problem(graph, profile, first, last)
    if not problem.needed:
        return []
    least, most = problem.keeping(()), problem.keeping(problem.needed)
    if len(problem.ops) == 1:
        return [least]
    return lower_hull(least, most, problem.solve)


class _Problem:
    """Columns: keep each storage made in the span, run each operation of it again."""

    def __init__(self, graph: Graph, profile: Profile, first: int, last: int) -> None:
        self.graph = graph
        self.makers = Makers(graph, first, last)
        self.needed: dict[int, int] = {}  # storage -> operations before the last time it is saved
        for save in graph.saves:
            sid = graph.values[save.value].storage
            if sid in self.makers.of and not save.held and first <= save.at <= last:
                self.needed[sid] = max(self.needed.get(sid, 0), save.at)
        self.storages, self.ops = self.makers.reachable(self.needed)
        count = len(self.storages)
        self.keep_of = {s: j for j, s in enumerate(self.storages)}
        self.again_of = {i: count + j for j, i in enumerate(self.ops)}
        costs = profile.costs
        self.time_s = np.array([costs[graph.ops[i].signature].time_s for i in self.ops])
        self.program = CutProgram(
            np.array([graph.storages[s].bytes for s in self.storages], dtype=float),
            self.time_s,
            # keeping what autograd does not save takes a dispatch mode over the forward pass, too
            [*(s in self.needed for s in self.storages), *(True for _ in self.ops)],
            [*self._recomputed(), *self._ancestors(), *self._draws()],
        )

    def _recomputed(self) -> Iterator[Row]:
        for sid, at in self.needed.items():
            for index in self.makers.of[sid]:
                if index < at:
                    yield [(self.keep_of[sid], 1.0), (self.again_of[index], 1.0)], 1.0

    def _ancestors(self) -> Iterator[Row]:
        for index in self.ops:
            for sid in self.makers.inputs(index):
                for maker in self.makers.of[sid]:
                    if maker < index:
                        yield (
                            [
                                (self.keep_of[sid], 1.0),
                                (self.again_of[maker], 1.0),
                                (self.again_of[index], -1.0),
                            ],
                            0.0,
                        )

    def _draws(self) -> Iterator[Row]:
        """A random operation that runs again needs the ones before it to do so."""
        random = [i for i in self.ops if self.graph.ops[i].random]
        for earlier, later in pairwise(random):
            yield [(self.again_of[earlier], 1.0), (self.again_of[later], -1.0)], 0.0

    def keeping(self, kept: Iterable[int]) -> Trade:
        """Nothing but these storages kept: either none, or all that backward needs."""
        chosen = tuple(kept)
        return Trade(
            frozenset(self._last_maker(s) for s in chosen),
            sum(self.graph.storages[s].bytes for s in chosen),
            0.0 if chosen else float(self.time_s.sum()),
        )

    def solve(self, price: float) -> Trade | None:
        """The best choice when a kept byte costs ``price`` seconds."""
        found = self.program.best(price)
        if found is None:
            return None
        kept = frozenset(self._last_maker(self.storages[j]) for j in found.kept)
        return Trade(kept, found.bytes, found.time_s)

    def _last_maker(self, sid: int) -> int:
        """The operation after which a storage is as it is saved."""
        at = self.needed.get(sid)
        return max((i for i in self.makers.of[sid] if at is None or i < at), default=-1)
