"""Plans with levels for one graph: a table per chain, out of which every budget is answered."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Protocol

from actckpt.data.plan import Burst, Plan, Region
from actckpt.errors import PlanError
from actckpt.policies.solver.chain import Chain, Schedule
from actckpt.policies.solver.chain_program import ChainProgram
from actckpt.pricing.simulate import Pricer

logger = logging.getLogger("actckpt")

# units that memory is counted in: as many as tables of this size have room for
_UNITS = (250, 4000)
_TABLE_BYTES = 160 << 20
# what the program says and what is priced differ by little: it is asked for that much less
_TRIES = 6


# what recomputes one item of a schedule
Parts = tuple[Region, ...] | tuple[Burst, ...]


class ChainForm(Protocol):
    """A chain of a graph, and what plans a schedule of it consists of."""

    @property
    def pricer(self) -> Pricer: ...

    @property
    def chain(self) -> Chain | None: ...

    def parts(self, schedule: Schedule) -> Iterator[Parts]: ...


class ChainPlans:
    """The plans of one chain, whatever the budget. Solving takes about a second, an answer none."""

    def __init__(self, form: ChainForm, chain: Chain, most_bytes: int) -> None:
        self._form = form
        self._pricer = form.pricer
        self._program = ChainProgram(chain, most_bytes, _units(len(chain)))

    def fastest(self, budget_bytes: int) -> tuple[Parts, ...] | None:
        """The parts of the fastest plan that is priced within the budget, or None."""
        asked = budget_bytes
        for _ in range(_TRIES):
            found = self._parts(asked)
            if found is None:
                break
            over_bytes = self._peak_bytes(found) - budget_bytes
            if over_bytes <= 0:
                return found
            asked -= max(over_bytes, self._program.unit_bytes)
        found = self.smallest
        return found if found is not None and self._peak_bytes(found) <= budget_bytes else None

    @cached_property
    def smallest(self) -> tuple[Parts, ...] | None:
        """Those of the plan of the lowest peak as the program sees it, or None."""
        least_bytes = self._program.least_bytes
        return None if least_bytes is None else self._parts(least_bytes)

    def _parts(self, budget_bytes: int) -> tuple[Parts, ...] | None:
        schedule = self._program.schedule(budget_bytes)
        try:
            return None if schedule is None else tuple(self._form.parts(schedule))
        except PlanError as error:
            logger.debug("levels: %s", error)
            return None

    def _peak_bytes(self, parts: tuple[Parts, ...]) -> int:
        return self._pricer.estimate(plan_of_parts(parts)).peak_bytes


def plan_of_parts(parts: Iterable[Parts]) -> Plan:
    """The plan that consists of these."""
    every = [part for of_item in parts for part in of_item]
    return Plan(
        "",
        tuple(p for p in every if isinstance(p, Region)),
        bursts=tuple(p for p in every if isinstance(p, Burst)),
    )


def _units(stages: int) -> int:
    """How many units a chain's tables, two triangles of single precision, have room for."""
    fewest, most = _UNITS
    return max(fewest, min(most, _TABLE_BYTES // (4 * stages * (stages + 1))))


def chain_plans(form: ChainForm) -> ChainPlans | None:
    """The plans of a chain up to the untouched peak; None where there is no chain."""
    chain = form.chain
    if chain is None:
        return None
    return ChainPlans(form, chain, form.pricer.estimate(Plan("")).peak_bytes)
