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
# of the largest budget: those below it have a table of their own, with smaller units
_FEW = 0.25
# what the program says and what is priced differ by little: it is asked for that much less,
# for ever less where that was not enough, and then for something between
_TRIES = 9


# what recomputes one item of a schedule
Parts = tuple[Region, ...] | tuple[Burst, ...]


class ChainForm(Protocol):
    """A chain of a graph, and what plans a schedule of it consists of."""

    @property
    def pricer(self) -> Pricer: ...

    @property
    def chain(self) -> Chain | None: ...

    @property
    def leaves_out_little(self) -> bool:
        """Whether its levels are those that are priced, so that small units are worth it."""
        ...

    def parts(self, schedule: Schedule) -> Iterator[Parts]: ...


class ChainPlans:
    """The plans of one chain, whatever the budget. Solving takes about a second, an answer none.

    What is held is rounded up to units: small budgets have a table of their own, whose units are
    small beside what few things they can hold, where the form leaves out less than that.
    """

    def __init__(self, form: ChainForm, chain: Chain, most_bytes: int) -> None:
        self._form = form
        self._pricer = form.pricer
        self._chain = chain
        self._most_bytes = most_bytes
        self._programs: dict[int, ChainProgram] = {}

    def fastest(self, budget_bytes: int, most_bytes: int = 0) -> tuple[Parts, ...] | None:
        """The parts of the fastest plan that is priced within the budget, or None.

        Args:
            most_bytes: the largest budget that is asked for beside it, out of the same table.
        """
        program = self._program(max(budget_bytes, most_bytes))
        best: tuple[Parts, ...] | None = None
        # what was asked for and fits, what was asked for and is too much
        low, high, asked = 0, budget_bytes + 1, budget_bytes
        for n in range(_TRIES):
            found = self._parts(program, asked)
            if found is None:
                break
            over_bytes = self._peak_bytes(found) - budget_bytes
            if over_bytes <= 0:
                best, low = found, asked
            else:
                high = asked
            if high - low <= program.unit_bytes:
                break
            less_bytes = max(over_bytes, program.unit_bytes) << n
            asked = asked - less_bytes if best is None else (low + high) // 2
        if best is not None:
            return best
        found = self.smallest
        return found if found is not None and self._peak_bytes(found) <= budget_bytes else None

    @cached_property
    def smallest(self) -> tuple[Parts, ...] | None:
        """Those of the plan of the lowest peak as the program sees it, or None."""
        for budget_bytes in (0, self._most_bytes):
            program = self._program(budget_bytes)
            if program.least_bytes is not None:
                return self._parts(program, program.least_bytes)
        return None

    def _program(self, budget_bytes: int) -> ChainProgram:
        """The table in which a budget is looked up."""
        few_bytes = int(_FEW * self._most_bytes) if self._form.leaves_out_little else 0
        most_bytes = few_bytes if 0 <= budget_bytes < few_bytes else self._most_bytes
        if most_bytes not in self._programs:
            units = _units(len(self._chain))
            self._programs[most_bytes] = ChainProgram(self._chain, most_bytes, units)
        return self._programs[most_bytes]

    def _parts(self, program: ChainProgram, budget_bytes: int) -> tuple[Parts, ...] | None:
        schedule = program.schedule(budget_bytes)
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
