"""Our plans for a model at the budgets that are asked for, each made once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import actckpt
from experiments.peers.subject import Subject

# a plan serves every peer whose peak is at most this much above its budget
SHARED = 1.005
# what is predicted to cost less than this is taken to cost nothing: it cannot be measured
FREE = 1.005
BISECTIONS = 5
# room below a peak that is worth another plan, and how many to make for it
ROOM = 0.01
FILLS = 4
CLOSE = 0.02  # a bisection ends where its bracket is this share of its upper end


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned copy of the model.

    Args:
        budget_bytes: on activations, as asked.
        predicted: step time over the untouched model's.
    """

    budget_bytes: int
    predicted: float
    predicted_bytes: int
    plan_s: float
    model: nn.Module
    report: actckpt.Report

    @property
    def name(self) -> str:
        """What its arm is called."""
        return f"ours, {self.budget_bytes} B"

    def row(self) -> dict[str, Any]:
        """What was planned, as JSON data."""
        plan = self.report.plan
        bound = self.report.lower_bound
        return {
            "budget_bytes": self.budget_bytes,
            "predicted": self.predicted,
            "lower_bound": None if bound is None else 1 + bound,
            "predicted_bytes": self.predicted_bytes,
            "plan_s": self.plan_s,
            "regions": sum(1 for _ in plan.walk()),
            "bursts": sum(1 for _ in plan.walk_bursts()),
        }


@dataclass(slots=True)
class Planner:
    """Plans by budget.

    Attributes:
        untouched_bytes: a budget that surely bounds nothing.
        smallest_bytes: no budget below it is accepted, as far as is known.
    """

    subject: Subject
    untouched_bytes: int
    plans: dict[int, Plan] = field(default_factory=dict)
    smallest_bytes: int = 1

    def at(self, budget_bytes: int) -> Plan | None:
        """The plan for a budget, or for one at most half a percent below; None where none fits."""
        for asked, plan in self.plans.items():
            if asked <= budget_bytes <= SHARED * asked:
                return plan
        if budget_bytes < self.smallest_bytes:
            return None
        model = copy.deepcopy(self.subject.model)
        begin = time.perf_counter()
        try:
            actckpt.optimize(
                model,
                budget_bytes / 1e9,
                batch=self.subject.batch,
                scope="activations",
                **self.subject.loss,
            )
        except actckpt.BudgetError as error:
            if error.smallest_bytes is None:
                raise
            # 0.2 % more at least, should the smallest not be accepted either
            more = budget_bytes + budget_bytes // 500 + 1
            self.smallest_bytes = max(self.smallest_bytes, error.smallest_bytes, more)
            return None
        plan_s = time.perf_counter() - begin
        report = actckpt.report(model)
        whole, planned = report.baseline.predicted, report.planned.predicted
        self.plans[budget_bytes] = Plan(
            budget_bytes=budget_bytes,
            predicted=planned.step_s / whole.step_s,
            predicted_bytes=planned.added_bytes or 0,
            plan_s=plan_s,
            model=model,
            report=report,
        )
        return self.plans[budget_bytes]

    def at_or_above(self, budget_bytes: int) -> Plan:
        """The plan for a budget, or for the smallest that is accepted."""
        plan = self.at(budget_bytes)
        while plan is None:  # the smallest is a number that was dry-run: seldom twice
            plan = self.at(self.smallest_bytes)
        return plan

    def filling(self, peak_bytes: int, peak_of: Callable[[Plan], int]) -> Plan:
        """The plan for a measured peak.

        A budget bounds gradients on their way to a parameter too, which the meter here leaves out:
        where that leaves room, the budget is raised by it, as long as the measured peak allows.
        """
        plan, budget = self.at_or_above(peak_bytes), peak_bytes
        more = peak_bytes - peak_of(plan)
        for _ in range(FILLS):
            if more <= ROOM * peak_bytes:
                break
            larger = self.at(budget + more)
            if larger is None or larger is plan:
                break
            if peak_of(larger) > peak_bytes:
                more //= 2
                continue
            plan, budget = larger, budget + more
            more = peak_bytes - peak_of(plan)
        return plan

    def no_slower(self, ratio: float) -> Plan:
        """The plan of the smallest budget that is predicted to take at most ``ratio`` times as
        long as the untouched model, by bisection from the budgets that are known."""
        wanted = max(ratio, FREE)

        def known(quick: bool) -> list[int]:
            return [b for b, plan in self.plans.items() if (plan.predicted <= wanted) is quick]

        if not known(True):
            self.at_or_above(self.untouched_bytes)
        for _ in range(BISECTIONS):
            high = min(known(True))
            low = max([b for b in known(False) if b < high], default=0)
            low = max(low, self.smallest_bytes)
            if high - low <= CLOSE * high:
                break
            if low == self.smallest_bytes > 1 and low not in self.plans:
                self.at_or_above(low)  # the end of the curve may do already
            else:
                self.at((low + high) // 2)
        return self.plans[min(known(True))]
