"""The program behind the bound: what is resident and what runs again, at instants of backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_array

from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.policies.solver.engines import Engine
from actckpt.policies.solver.makers import Makers
from actckpt.policies.solver.solver_output import milp
from actckpt.pricing.simulate import Pricer

# columns of one program
COLUMNS = 2_400
_NODE_LIMIT = 10
# operations between instants of one program
_APART = 8
# of the budget: a solution that is less too high has little to gain by an instant, kept or run
_SLIGHT = 0.01
_MUCH = 0.5
_INFEASIBLE = 2

# columns with factors, and what their sum is not below
Row = tuple[list[tuple[int, float]], float]


@dataclass(frozen=True, slots=True)
class Use:
    """Backward needs a storage in operations ``[first, until)``, as it was when it was saved."""

    first: int
    until: int  # autograd lets go of what a node has read when the node is done
    saved: int
    number: int  # of the save


class Infeasible(Exception):
    """No plan fits, and why."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Of one program: its bound, and at each of its instants what is resident and what runs again.

    Both () where none was found.
    """

    extra_s: float
    resident: tuple[frozenset[int], ...] = ()
    again: tuple[frozenset[int], ...] = ()


class Residency:
    """The program: columns are (resident storages, recomputed operations) at each instant."""

    def __init__(self, graph: Graph, profile: Profile) -> None:
        self.graph = graph
        self.pricer = Pricer(graph, profile)
        self.end = graph.forward_end
        self.makers = Makers(graph, 0, self.end)
        self.uses = self._uses()
        self.storages, self.ops = self.makers.reachable(self.uses)
        self.made_by: dict[int, set[int]] = {i: set() for i in self.ops}
        for sid in self.storages:
            for index in self.makers.of[sid]:
                self.made_by[index].add(sid)
        self.width = len(self.storages) + len(self.ops)
        self.column_of = {s: j for j, s in enumerate(self.storages)}
        self.again_of = {i: len(self.storages) + j for j, i in enumerate(self.ops)}

    def _uses(self) -> dict[int, list[Use]]:
        uses: dict[int, list[Use]] = {}
        for number, save in enumerate(self.graph.saves):
            sid = self.graph.values[save.value].storage
            if sid in self.makers.of and not save.held and save.first_use >= self.end:
                until = max(save.released, save.first_use + 1)
                uses.setdefault(sid, []).append(Use(save.first_use, until, save.at, number))
        return uses

    # ---- memory

    @cached_property
    def fixed(self) -> np.ndarray:
        """Level at each operation when nothing is saved for backward."""
        pricer = self.pricer
        level = np.zeros(pricer.count + 1, dtype=np.int64)
        start = np.maximum(pricer.born, 0)
        stop = np.maximum(np.clip(pricer.died, 0, pricer.count), start)
        np.add.at(level, start, pricer.bytes)
        np.add.at(level, stop, -pricer.bytes)
        found: np.ndarray = np.cumsum(level)[: pricer.count] + pricer.workspace
        return found

    @cached_property
    def least(self) -> np.ndarray:
        """Level at each operation when nothing is resident but what it needs."""
        level: np.ndarray = self.fixed + self.beside(frozenset())
        return level

    def beside(self, resident: frozenset[int]) -> np.ndarray:
        """Bytes at each operation beside the fixed ones when these storages stay resident."""
        level = np.zeros(self.pricer.count + 1, dtype=np.int64)
        for sid, stop in self._read_until(resident).items():
            size, died = self.pricer.bytes[sid], self.pricer.died[sid]
            spans = [(max(u.first, died), u.until) for u in self.uses.get(sid, ())]
            if sid in resident:
                spans = [(died, stop)]
            for start, stop in _disjoint(spans):
                level[start] += size
                level[min(stop, self.pricer.count)] -= size
        found: np.ndarray = np.cumsum(level)[: self.pricer.count]
        return found

    def _read_until(self, resident: frozenset[int]) -> dict[int, int]:
        """Storage -> end of the last operation of backward that needs it, or what is made of it."""
        until = {sid: max(u.until for u in uses) for sid, uses in self.uses.items()}
        for index in reversed(self.ops):
            made = self.made_by[index] - resident
            last = max((until.get(sid, 0) for sid in made), default=0)
            for sid in self.makers.inputs(index):
                until[sid] = max(until.get(sid, 0), last)
        return until

    @property
    def floor(self) -> tuple[int, int]:
        """(bytes, operation): the highest level that nothing can lower, and where it is."""
        level = self.least
        if not len(level):
            return 0, 0
        at = int(np.argmax(level))
        return int(level[at]), at

    # ---- the program

    def least_extra_s(self, budget_bytes: int, instants: Sequence[int], engine: Engine) -> Solution:
        """Seconds beyond the untouched step's that no plan of a kind goes without.

        Raises:
            Infeasible: what backward needs does not fit at the instants.
        """
        if not self.uses:
            return Solution(0.0)
        width, count, own = self.width, len(instants), len(engine.columns_s)
        # what is used later is resident now, or made again
        later = {s for s, uses in self.uses.items() if any(u.first > instants[0] for u in uses)}
        remade_s = np.zeros(len(self.storages))
        for sid in later:
            remade_s[self.column_of[sid]] = engine.remade_s[sid]
        times = [float(self.pricer.time_s[i]) + engine.again_s for i in self.ops]
        cost = np.tile(np.array([0.0] * len(self.storages) + times), count)
        cost[: len(remade_s)] = -remade_s
        cost = np.append(cost, engine.columns_s)
        unit_s, unit = max(cost.max(), 1e-12), max(1, int(self.pricer.bytes.max()))
        terms = self._engine_terms(engine, count, later)
        memory: list[Row] = []
        forced = np.zeros(width * count + own)
        for k, begin in enumerate(instants):
            until = instants[k + 1] if k + 1 < count else self.pricer.count
            base = k * width
            terms += self._needed(base, begin, until, forced)
            terms += self._ancestors(base)
            if k + 1 < count:
                terms += self._carried(base, until)
            room = (budget_bytes - self.fixed[begin]) / unit
            weights = [
                (base + self.column_of[s], float(self.pricer.bytes[s]) / unit)
                for s in self.storages
                if self.pricer.died[s] <= begin
            ]
            memory.append((weights, room))
        size = width * count + own
        integral = np.ones(size)
        integral[width * count :] = 0  # the least that the others leave them
        result = milp(
            cost / unit_s,
            constraints=[
                LinearConstraint(_matrix(terms, size), [b for _, b in terms], np.inf),
                LinearConstraint(_matrix(memory, size), -np.inf, [b for _, b in memory]),
            ],
            integrality=integral,
            bounds=Bounds(forced, 1.0),
            options={"node_limit": _NODE_LIMIT, "mip_rel_gap": 2e-3},
        )
        if result.status == _INFEASIBLE:
            raise Infeasible(
                f"what backward needs at {count} instants does not fit whatever is recomputed"
            )
        found = result.mip_dual_bound
        extra_s = 0.0
        if found is not None:
            extra_s = max(0.0, float(found) * unit_s + float(remade_s.sum()))
        if result.x is None:
            return Solution(extra_s)
        stages = result.x[: width * count].reshape(count, width) > 0.5
        columns = np.array([*self.storages, *self.ops])
        split = len(self.storages)
        return Solution(
            extra_s,
            tuple(frozenset(columns[:split][row[:split]].tolist()) for row in stages),
            tuple(frozenset(columns[split:][row[split:]].tolist()) for row in stages),
        )

    def _engine_terms(self, engine: Engine, count: int, later: Set[int]) -> list[Row]:
        """What the engine's own columns, behind all others, are at least."""
        base = self.width * count
        terms: list[Row] = [([(base + j, f) for j, f in row], 0.0) for row in engine.rows]
        terms += [
            ([(base + j, 1.0), (self.column_of[sid], 1.0)], 1.0)
            for j, sid in engine.saved
            if sid in later
        ]
        terms += [
            ([(base + j, 1.0), (k * self.width + self.again_of[index], -1.0)], 0.0)
            for j, index in engine.again
            if index in self.again_of
            for k in range(count)
        ]
        return terms

    def refinements(
        self, instants: Sequence[int], budget_bytes: int, found: Solution
    ) -> Iterator[list[int]]:
        """The instants, and one at which a solution is too high: for what it keeps; as it is run.

        [] where it is hardly so. Not one near another. A program that would grow too large loses
        those at which the most is left, but for the end of the forward pass.
        """
        over = np.full(self.pricer.count, -budget_bytes, dtype=np.int64)
        over[: self.end] = 0
        spans = list(itertools.pairwise([*instants, self.pricer.count]))
        for resident, (begin, until) in zip(found.resident, spans, strict=False):
            over[begin:until] += (self.fixed + self.beside(resident))[begin:until]
        yield self._refined(instants, over, int(_SLIGHT * budget_bytes))
        for k, (begin, until) in enumerate(spans[: len(found.resident)]):
            over[begin:until] += self._made_again(found, k, begin, until)[begin:until]
        yield self._refined(instants, over, int(_MUCH * budget_bytes))

    def _refined(self, instants: Sequence[int], over: np.ndarray, most_bytes: int) -> list[int]:
        later = sorted((at for at in instants if at != self.end), key=lambda at: -over[at])
        apart = over.copy()
        apart[self.end] = 0
        for at in later:
            apart[max(0, at - _APART) : at + _APART + 1] = 0
        fresh = int(np.argmax(apart))
        room = max(0, COLUMNS // max(1, self.width) - 2)
        return sorted({self.end, *later[:room], fresh}) if apart[fresh] > most_bytes else []

    def _made_again(self, found: Solution, k: int, begin: int, until: int) -> np.ndarray:
        """Bytes at each operation of what a solution makes again after an instant.

        Each operation runs as late as may be. Backward's own uses count in any case.
        """
        resident = found.resident[k]
        later = found.resident[k + 1] if k + 1 < len(found.resident) else frozenset()
        first = dict.fromkeys(later - resident, until)
        last = dict.fromkeys(later - resident, until)
        for index in sorted(found.again[k], reverse=True):
            made = self.made_by[index] - resident
            for sid in made:
                for use in self.uses.get(sid, ()):
                    if begin < use.first < until and index < use.saved:
                        first[sid] = min(first.get(sid, until), use.first)
                        last[sid] = max(last.get(sid, 0), min(use.until, until))
            runs_at = min((first.get(sid, until) for sid in made), default=until)
            first.update(dict.fromkeys(made, runs_at))
            for sid in self.makers.inputs(index) - resident:
                first[sid] = min(first.get(sid, until), runs_at)
                last[sid] = max(last.get(sid, 0), runs_at + 1)
        level = np.zeros(self.pricer.count, dtype=np.int64)
        for sid, at in first.items():
            there = np.zeros(self.pricer.count, dtype=bool)
            there[max(at, int(self.pricer.died[sid])) : last.get(sid, 0)] = True
            for use in self.uses.get(sid, ()):
                there[use.first : use.until] = False
            level[there] += self.pricer.bytes[sid]
        return level

    def near(self, at: int) -> list[int]:
        """The highest instants shortly before and after one, when nothing is resident."""
        spans = (
            (max(self.end + 1, at - _APART), at),
            (at + 1, min(self.pricer.count, at + 1 + _APART)),
        )
        return [a + int(np.argmax(self.least[a:b])) for a, b in spans if a < b]

    def _needed(self, base: int, begin: int, until: int, forced: np.ndarray) -> list[Row]:
        """What backward uses until the next instant is resident or recomputed."""
        found = []
        for sid, uses in self.uses.items():
            column = base + self.column_of[sid]
            for use in uses:
                if use.first <= begin < use.until:
                    forced[column] = 1.0
                elif begin < use.first < until:
                    found += [
                        ([(column, 1.0), (base + self.again_of[i], 1.0)], 1.0)
                        for i in self.makers.of[sid]
                        if i < use.saved
                    ]
        return found

    def _ancestors(self, base: int) -> list[Row]:
        """What a recomputed operation reads is resident or recomputed."""
        return [
            (
                [
                    (base + self.column_of[sid], 1.0),
                    (base + self.again_of[maker], 1.0),
                    (base + self.again_of[index], -1.0),
                ],
                0.0,
            )
            for index in self.ops
            for sid in self.makers.inputs(index)
            for maker in self.makers.of[sid]
            if maker < index
        ]

    def _carried(self, base: int, until: int) -> list[Row]:
        """What is resident at the next instant was so at this one, or was recomputed since."""
        return [
            (
                [
                    (base + self.column_of[sid], 1.0),
                    (base + self.again_of[maker], 1.0),
                    (base + self.width + self.column_of[sid], -1.0),
                ],
                0.0,
            )
            for sid in self.storages
            if self.pricer.died[sid] <= until
            for maker in self.makers.of[sid]
        ]


def _disjoint(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same instants in spans that do not overlap."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif stop > start:
            found.append((start, stop))
    return found


def _matrix(rows: Sequence[Row], columns: int) -> csr_array:
    indices = [c for row, _ in rows for c, _ in row]
    data = [v for row, _ in rows for _, v in row]
    starts = np.cumsum([0, *(len(row) for row, _ in rows)])
    return csr_array((data, indices, starts), shape=(len(rows), columns))
