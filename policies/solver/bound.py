"""What no plan can beat: the least time of a step within a budget, and the least peak at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actckpt.data.graph import Graph
from actckpt.data.profile import Profile
from actckpt.policies.solver.engines import Engine, by_calls, by_operations
from actckpt.policies.solver.residency import COLUMNS, Infeasible, Residency, Solution
from actckpt.units import format_bytes

# programs in a row, each with one instant more
_PROGRAMS = 6
# one that brings less, as a share of the bound, is the last
_GAIN = 1e-3


@dataclass(frozen=True, slots=True)
class Bound:
    """What holds for every way to recompute, relative to the profile.

    Attributes:
        step_s: no plan within the budget takes less; infinite where none fits.
        overhead: the same over the untouched step's time, minus 1.
        smallest_bytes: no plan has a lower peak, whatever its time.
        certificate: why, in one line.
        by_operations, by_calls: the overhead that no plan of that kind can beat; infinite where
            there is none. The smaller is ``overhead``.
    """

    step_s: float
    overhead: float
    smallest_bytes: int
    certificate: str
    by_operations: float = math.inf
    by_calls: float = math.inf

    @property
    def possible(self) -> bool:
        """Whether the bound leaves room for a plan."""
        return math.isfinite(self.step_s)


def lower_bound(graph: Graph, profile: Profile, budget_bytes: int) -> Bound:
    """The least step time that any recomputation within a budget can reach.

    A relaxation with one binary per operation and instant: at chosen instants of backward, what is
    resident fits beside what is there in any case; what backward needs afterwards and is not
    resident is recomputed at least once, from what is, which costs the operations' time and what
    the engine takes at least. A plan recomputes by operations or by calls, which pay differently:
    each kind has its bound. Replays in whole regions, order, and the memory inside replays are left
    out, so every plan's price lies above.

    The largest of several such bounds: the first looks at the end of the forward pass, every other
    one also at an instant at which the solution before it is highest above the budget, for what it
    keeps or else as it is run, the second at others near by as well.
    O(operations x instants) columns each.

    References:
        Jain et al. 2020, Checkmate, section 4 (the staged program, here coarse in time).
    """
    program = Residency(graph, profile)
    base_s = float(program.pricer.time_s.sum())
    least_bytes, at = program.floor
    if budget_bytes < least_bytes:
        return Bound(math.inf, math.inf, least_bytes, _needs(graph, least_bytes, at))
    room_bytes = budget_bytes - int(program.fixed[program.end :].min(initial=budget_bytes))
    calls = by_calls(program.pricer, program.uses.keys(), room_bytes)
    extra_s: dict[str, float] = {}
    try:
        if program.pricer.possible.refusal:
            extra_s["by_calls"], _ = _least_extra_s(program, budget_bytes, calls)
        else:
            saves = {sid: [use.number for use in uses] for sid, uses in program.uses.items()}
            operations = by_operations(program.pricer, saves)
            extra_s["by_operations"], instants = _least_extra_s(program, budget_bytes, operations)
            # memory is short where it is short, whatever the engine costs
            extra_s["by_calls"] = program.least_extra_s(budget_bytes, instants, calls).extra_s
    except Infeasible as error:
        return Bound(math.inf, math.inf, least_bytes, str(error))
    least_s = min(extra_s.values())
    return Bound(
        base_s + least_s,
        least_s / base_s if base_s else 0.0,
        least_bytes,
        "residency and recomputation at the ends of the forward pass and at instants of backward",
        **{kind: seconds / base_s if base_s else 0.0 for kind, seconds in extra_s.items()},
    )


def _least_extra_s(
    program: Residency, budget_bytes: int, engine: Engine
) -> tuple[float, list[int]]:
    """What plans of one kind take beyond the untouched step at least, and instants that show it.

    Raises:
        Infeasible: none fits.
    """
    most = Solution(-1.0)
    instants = at = [program.end]
    seen: list[list[int]] = []
    while at and len(seen) < _PROGRAMS:
        seen.append(at)
        tried = [at]
        if len(at) == 2 and 2 * program.width <= COLUMNS:
            # quick programs, on whose second instant all others build
            tried += [[program.end, near] for near in program.near(at[-1])]
        found = [program.least_extra_s(budget_bytes, candidate, engine) for candidate in tried]
        best, at = max(zip(found, tried, strict=True), key=lambda pair: pair[0].extra_s)
        is_last = best.extra_s <= (1 + _GAIN) * most.extra_s
        if best.extra_s > most.extra_s:
            most, instants = best, at
        if is_last:
            break
        refinements = program.refinements(at, budget_bytes, best)
        at = next((fresh for fresh in refinements if fresh and fresh not in seen), [])
    return most.extra_s, instants


def smallest_peak(graph: Graph, profile: Profile) -> tuple[int, str]:
    """(bytes, why): a peak that no plan can go below, however slow.

    At some operation this much exists even if nothing were saved but what it reads.
    """
    least_bytes, at = Residency(graph, profile).floor
    return least_bytes, _needs(graph, least_bytes, at)


def _needs(graph: Graph, least_bytes: int, at: int) -> str:
    if not graph.ops:
        return "nothing runs"
    op = graph.ops[at]
    return (
        f"{op.name} (operation {at}, {op.phase} pass) needs {format_bytes(least_bytes)} with what "
        "exists beside it whatever is recomputed"
    )
