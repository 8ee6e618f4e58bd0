"""Chooses disjoint regions: least time, with memory at every instant as the constraint."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from actckpt.errors import PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan, Region
from actckpt.policies.blocks import blocks
from actckpt.policies.options import Covers, Options, spans
from actckpt.policies.structure import structure
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile

_ROUNDS = 40
# nodes times columns, not seconds: the same question must have the same answer on a busy machine
_NODES = 20_000
_GAP = 5e-3
_CLOSE = 5e-3
_TRIES = 4


@dataclass(frozen=True, slots=True)
class _Choice:
    """One region: the calls that it takes, what it adds to the step's time and to each instant."""

    covers: Covers
    region: Region
    time_s: float
    delta: np.ndarray


class Packing:
    """Regions of every size, each taking some calls; no call is taken twice.

    A block may be taken as a whole, with others, call by call, or left alone, whatever its
    neighbours do. The memory of a step is the untouched timeline plus what each chosen region
    changes: exact up to storages that several regions hold and recomputations at the same instant.
    Instants enter the program as they turn out to bind.
    """

    def __init__(self, graph: Graph, profile: Profile, pricer: Pricer) -> None:
        self.pricer = pricer
        base = pricer.estimate(Plan("none"))
        self.base = base.timeline
        self.base_time_s = base.time_s
        self.choices: list[_Choice] = []
        coarse = blocks(graph)
        self.options = Options(graph, profile)
        survivors: dict[Hashable, list[int]] = {}
        for b in coarse:
            candidates = list(self.options.within(b))
            key = structure(graph, b)
            known = survivors.get(key)
            priced = self._priced(candidates, known)
            if known is None:
                priced = _undominated(priced)
                survivors[key] = [index for index, _ in priced]
            self.choices += [choice for _, choice in priced]
        longer = [
            (frozenset(c for b in taken for c in self.options.covers(b)), found)
            for taken, found in spans(graph, coarse, len(coarse))
        ]
        self.choices += [choice for _, choice in _undominated(self._priced(longer, None))]
        taken = sorted({c for choice in self.choices for c in choice.covers})
        self.rows_of = {call: row for row, call in enumerate(taken)}

    def _priced(
        self, candidates: list[tuple[Covers, Region]], wanted: list[int] | None
    ) -> list[tuple[int, _Choice]]:
        found = []
        for index in range(len(candidates)) if wanted is None else wanted:
            covers, region = candidates[index]
            try:
                price = self.pricer.estimate(Plan("", (region,)))
            except PlanError:
                continue
            delta = price.timeline - self.base
            choice = _Choice(covers, region, price.time_s - self.base_time_s, delta)
            found.append((index, choice))
        return found

    def least_time(self, budget_bytes: int) -> Plan | None:
        """The fastest choice that fits, or None if none was found.

        Regions that hold the same storage are charged for it together once, separately twice: what
        a solution turns out to need less than the sum of its regions is credited to the next try.
        """
        best, best_s = None, math.inf
        instants = self._binding(self.base, budget_bytes, [])
        credit = np.zeros(len(self.base), dtype=np.int64)
        for _ in range(_TRIES):
            plan = self._solve(budget_bytes, instants, credit)
            if plan is None:
                break
            price = self.pricer.estimate(plan)
            if price.time_s >= best_s:
                break
            best, best_s = plan, price.time_s
            credit = np.maximum(0, self._sum(plan) - price.timeline)
            if not credit.any():
                break
        return best

    def _sum(self, plan: Plan) -> np.ndarray:
        """The level at each instant as the program sees it."""
        deltas = (self.pricer.estimate(Plan("", (r,))).timeline - self.base for r in plan.regions)
        total: np.ndarray = sum(deltas, self.base)
        return total

    def least_memory(self, known_bytes: int) -> Plan | None:
        """A choice of the smallest peak, to half a per cent, or None if none is below the known."""
        instants: list[int] = []
        best = None
        below, peak = 0, known_bytes
        asked = math.floor(peak * (1 - _CLOSE))
        while peak - below > _CLOSE * peak:
            plan = self._solve(asked, instants, self.base * 0)
            if plan is None:
                below = asked
            else:
                best, peak = plan, self.pricer.estimate(plan).peak_bytes
            asked = (below + peak) // 2
        return best

    def _solve(self, budget_bytes: int, instants: list[int], credit: np.ndarray) -> Plan | None:
        """Adds to ``instants`` until those decide it."""
        if not self.choices:
            return None
        for _ in range(_ROUNDS):
            picked = self._program(instants, budget_bytes + credit)
            if picked is None:
                return None
            plan = Plan("auto", tuple(c.region for c in picked))
            price = self.pricer.estimate(plan)
            if price.peak_bytes <= budget_bytes:
                return plan
            fresh = self._binding(price.timeline, budget_bytes, instants)
            # recomputations at the same instant may need more than the sum of the regions says
            over = price.timeline > budget_bytes
            short = np.minimum(credit, self._sum(plan) - price.timeline)
            tighter = np.where(over, short, credit)
            if not fresh and (tighter == credit).all():
                return None
            instants.extend(fresh)
            credit = tighter
        return None

    @staticmethod
    def _binding(levels: np.ndarray, budget_bytes: int, known: list[int]) -> list[int]:
        """The highest instants above the budget that are not known yet, far apart."""
        window = max(1, len(levels) // 64)
        found: list[int] = []
        for start in range(0, len(levels), window):
            at = start + int(np.argmax(levels[start : start + window]))
            if levels[at] > budget_bytes and at not in known:
                found.append(at)
        return found

    def _program(self, instants: list[int], budget_bytes: np.ndarray) -> list[_Choice] | None:
        """The integer program over some instants: at most one choice per call, all within."""
        n = len(self.choices)
        # whole numbers of small units: the solver's tolerances then decide nothing
        unit = max(1, int(self.base.max()) >> 20)
        at = np.array(instants, dtype=np.int64)
        deltas = np.ceil(np.array([c.delta[at] for c in self.choices]).T / unit)
        time_s = np.array([c.time_s for c in self.choices])
        unit_s = max(float(np.abs(time_s).max()), 1e-12)
        once = np.zeros((len(self.rows_of), n))
        for j, c in enumerate(self.choices):
            once[[self.rows_of[call] for call in c.covers], j] = 1.0
        constraints = [LinearConstraint(once, -np.inf, 1.0)]
        if instants:
            room = np.floor((budget_bytes[at] - self.base[at]) / unit)
            constraints.append(LinearConstraint(deltas, -np.inf, room))
        result = milp(
            time_s / unit_s,
            constraints=constraints,
            integrality=np.ones(n),
            bounds=Bounds(0.0, 1.0),
            options={"node_limit": max(50, _NODES // n), "mip_rel_gap": _GAP},
        )
        if result.x is None:
            return None
        picked = [c for j, c in enumerate(self.choices) if result.x[j] > 0.5]
        return sorted(picked, key=lambda c: min(c.covers))


def _undominated(choices: list[tuple[int, _Choice]]) -> list[tuple[int, _Choice]]:
    """Those that lower something, and for which no other one takes no more calls, is as fast and
    nowhere higher."""
    kept: list[tuple[int, _Choice]] = []
    for index, c in sorted(choices, key=lambda x: (x[1].time_s, len(x[1].covers), x[0])):
        if c.delta.min(initial=0) < 0 and not any(
            k.covers <= c.covers and (k.delta <= c.delta).all() for _, k in kept
        ):
            kept.append((index, c))
    return kept
