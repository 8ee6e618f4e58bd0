"""The error that hands over a plan: the smallest that was found, where none fits."""

from __future__ import annotations

from collections.abc import Mapping

from actckpt.data.plan import Plan
from actckpt.errors import ActckptError


class BudgetError(ActckptError, ValueError):
    """No plan fits the budget, or the budget is not a positive number.

    Attributes:
        budget_bytes: what was asked, or None when it was not a number.
        smallest_bytes: the smallest peak found, or None when nothing was planned.
        smallest_plan: the plan of that peak, where a policy raises the error and has one.
        excluded_bytes: it is proved that no plan has a lower peak; None when nothing was planned.
        split: what ``smallest_bytes`` is made of, in bytes by name; empty when nothing was planned.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int | None = None,
        smallest_bytes: int | None = None,
        smallest_plan: Plan | None = None,
        excluded_bytes: int | None = None,
        split: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.smallest_plan = smallest_plan
        self.excluded_bytes = excluded_bytes
        self.split = dict(split or {})
