"""Chooses one option per block: least time, with memory at every instant as the constraint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from actckpt.errors import PlanError
from actckpt.graph import Graph
from actckpt.plan import Plan, Region
from actckpt.policies.options import options
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile

_ROUNDS = 40
# nodes, not seconds: the same question must have the same answer on a busy machine
_NODE_LIMIT = 500


@dataclass(frozen=True, slots=True)
class _Choice:
    """One option of one item: what it adds to the step's time and to each instant."""

    item: int
    region: Region
    time_s: float
    delta: np.ndarray


class Knapsack:
    """Items are disjoint candidate stages; each is left alone or recomputed in one of its ways.

    The memory of a step is the untouched timeline plus what each chosen option changes, which is
    exact up to the order of recomputations that happen at the same instant. Instants enter the
    program as they turn out to bind.
    """

    def __init__(self, graph: Graph, profile: Profile, pricer: Pricer, stages: tuple[int, ...]):
        self.pricer = pricer
        self.items = len(stages)
        base = pricer.estimate(Plan("none"))
        self.base = base.timeline
        self.base_peak_at = base.peak_at
        self.base_time_s = base.time_s
        self.choices: list[_Choice] = []
        for item, stage in enumerate(stages):
            candidates = []
            for option in options(graph, profile, stage):
                try:
                    price = pricer.estimate(Plan("", (option,)))
                except PlanError:
                    continue
                delta = price.timeline - self.base
                candidates.append(_Choice(item, option, price.time_s - base.time_s, delta))
            self.choices.extend(_undominated(candidates))

    def least_time(self, budget_bytes: int) -> Plan | None:
        """The fastest choice that fits, or None if none was found."""
        return self._solve(budget_bytes)

    def least_memory(self) -> Plan:
        """The choice of the smallest peak, the fastest of those."""
        plan = self._solve(None)
        return plan if plan is not None else Plan("auto")

    def _solve(self, budget_bytes: int | None) -> Plan | None:
        if not self.choices:
            return None
        rows = [self.base_peak_at]
        best: tuple[int, Plan] | None = None
        for _ in range(_ROUNDS):
            picked = self._program(rows, budget_bytes)
            if picked is None:
                break
            plan = Plan("auto", tuple(c.region for c in picked))
            price = self.pricer.estimate(plan)
            if budget_bytes is not None and price.peak_bytes <= budget_bytes:
                return plan
            if best is None or price.peak_bytes < best[0]:
                best = (price.peak_bytes, plan)
            fresh = self._binding(price.timeline, budget_bytes, rows)
            if not fresh:
                break
            rows.extend(fresh)
        return None if budget_bytes is not None or best is None else best[1]

    @staticmethod
    def _binding(levels: np.ndarray, budget_bytes: int | None, rows: list[int]) -> list[int]:
        """The highest instants that the program does not know yet, a few at a time, far apart."""
        window = max(1, len(levels) // 64)
        found: list[int] = []
        known = set(rows)
        floor = budget_bytes if budget_bytes is not None else int(levels.max() * 0.98)
        for start in range(0, len(levels), window):
            at = start + int(np.argmax(levels[start : start + window]))
            if levels[at] > floor and at not in known:
                found.append(at)
        return found

    def _program(self, rows: list[int], budget_bytes: int | None) -> list[_Choice] | None:
        """The mixed-integer program over the instants ``rows``."""
        n = len(self.choices)
        scale = float(self.base.max()) or 1.0
        at = np.array(rows)
        deltas = np.array([c.delta[at] for c in self.choices], dtype=float).T / scale
        time_s = np.array([c.time_s for c in self.choices])
        unit_s = max(float(np.abs(time_s).max()), 1e-12)
        once = np.zeros((self.items, n + 1))
        for j, c in enumerate(self.choices):
            once[c.item, j] = 1.0
        base = self.base[at] / scale
        # the last column is the peak itself, which is minimised where there is no budget
        memory = np.hstack([deltas, -np.ones((len(rows), 1))])
        if budget_bytes is None:
            cost = np.append(time_s / unit_s * 1e-6, 1.0)
            bounds = Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf))
        else:
            cost = np.append(time_s / unit_s, 0.0)
            limit = budget_bytes / scale
            bounds = Bounds(np.append(np.zeros(n), limit), np.append(np.ones(n), limit))
        result = milp(
            cost,
            constraints=[
                LinearConstraint(once, -np.inf, 1.0),
                LinearConstraint(memory, -np.inf, -base),
            ],
            integrality=np.append(np.ones(n), 0),
            bounds=bounds,
            options={"node_limit": _NODE_LIMIT, "mip_rel_gap": 1e-3},
        )
        if result.x is None:
            return None
        return [c for j, c in enumerate(self.choices) if result.x[j] > 0.5]


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    """Without those that are as slow as another and nowhere lower."""
    kept: list[_Choice] = []
    for c in sorted(choices, key=lambda c: c.time_s):
        if not any((k.delta <= c.delta).all() for k in kept):
            kept.append(c)
    return kept
