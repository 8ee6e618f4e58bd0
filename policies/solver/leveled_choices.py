"""Choices with levels for a packing: the parts of the best plans of a chain of pieces."""

from __future__ import annotations

from collections.abc import Iterable

from actckpt.data.plan import Burst, Plan
from actckpt.policies.solver.burst_choices import priced
from actckpt.policies.solver.chain_plans import ChainPlans, Parts, chain_plans
from actckpt.policies.solver.packing import Choice
from actckpt.policies.solver.piece_chain import PieceChain
from actckpt.pricing.simulate import Pricer

# of a budget: what is best there may be part of what is best here
_NEIGHBOURS = (0.85, 0.92, 0.96, 1.0, 1.04, 1.08, 1.15, 1.25)
# of what is saved: with a larger piece the chain is too coarse to say what is impossible
_LARGE = 0.25


class LeveledChoices:
    """The plans of a chain of pieces as choices; none where the forward is no such chain."""

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self._base = pricer.estimate(Plan(""))
        form = PieceChain(pricer)
        self._plans: ChainPlans | None = chain_plans(form)
        self.is_fine = self._plans is not None and form.largest_share <= _LARGE

    def fastest(self, budget_bytes: int) -> list[Choice] | None:
        """Those of the fastest plan that is priced within a budget, or None."""
        return self._fastest(budget_bytes, budget_bytes)

    def _fastest(self, budget_bytes: int, about_bytes: int) -> list[Choice] | None:
        """The same, out of the table that all budgets about one are looked up in."""
        most_bytes = int(max(_NEIGHBOURS) * about_bytes)
        found = None if self._plans is None else self._plans.fastest(budget_bytes, most_bytes)
        return None if found is None else self._choices(found)

    def smallest(self) -> list[Choice]:
        """Those of the plan of the lowest peak."""
        found = None if self._plans is None else self._plans.smallest
        return self._choices(found or ())

    def near(self, budget_bytes: int) -> list[Choice]:
        """Those of the fastest plans about a budget, each once."""
        found: dict[Parts, Choice] = {}
        for share in _NEIGHBOURS:
            for choice in self._fastest(int(share * budget_bytes), budget_bytes) or ():
                found.setdefault(choice.parts, choice)
        return list(found.values())

    def _choices(self, parts: Iterable[Parts]) -> list[Choice]:
        ways = (tuple(p for p in of_item if isinstance(p, Burst)) for of_item in parts)
        found = (priced(self._pricer, self._base, way) for way in ways)
        return [choice for choice in found if choice is not None]
