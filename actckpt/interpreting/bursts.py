"""A plan's bursts, looked up in the graph: what each makes and reads, and when it runs."""

from __future__ import annotations

from dataclasses import dataclass

from actckpt.data.plan import Burst, Plan
from actckpt.errors import PlanError
from actckpt.interpreting.recomputation import RESIDENT, Recomputation


@dataclass(frozen=True, slots=True)
class PlacedBurst:
    """A burst with its place in the graph.

    Attributes:
        index: position in ``Plan.walk_bursts()``.
        parent: index of the burst that it is inside of, or -1.
        made: activations that it makes again.
        pins: activations that it reads as the forward left them.
        taken: activation -> index of the burst that hands it over.
        residents: parameters, buffers, batch and constants that it reads.
        at: the operation of backward before which it runs (-1: never).
    """

    index: int
    burst: Burst
    parent: int
    made: frozenset[int]
    pins: frozenset[int]
    taken: dict[int, int]
    residents: frozenset[int]
    at: int


def place_bursts(possible: Recomputation, plan: Plan) -> tuple[PlacedBurst, ...]:
    """Every burst of ``plan`` in its place, in ``Plan.walk_bursts()`` order.

    Raises:
        PlanError: the bursts are of another trace, or cannot give what they are to give.
    """
    if not plan.bursts:
        return ()
    if plan.regions:
        raise PlanError("a plan recomputes either by calls (regions) or by operations (bursts)")
    if possible.refusal:
        raise PlanError(f"this model cannot be recomputed by operations: {possible.refusal}")
    found: list[PlacedBurst] = []
    taken: set[int] = set()
    for burst in plan.bursts:
        _place(possible, burst, -1, found, taken)
    return tuple(found)


def _place(
    possible: Recomputation, burst: Burst, parent: int, found: list[PlacedBurst], taken: set[int]
) -> int:
    graph = possible.graph
    first, last = possible.span
    index = len(found)
    if list(burst.ops) != sorted(set(burst.ops)):
        raise PlanError(f"burst {index}: its operations are not in ascending order")
    for op in burst.ops:
        if not (first <= op < last) or graph.ops[op].view or not possible.can_run(op):
            raise PlanError(f"burst {index}: operation {op} of this trace cannot be run again")
    running = set(burst.ops)
    touched = {s for op in burst.ops for s in possible.outputs(op) if s in possible.makers}
    made = frozenset(s for s in touched if possible.makers[s][0] in running)
    for k in burst.drops:
        sid = graph.values[graph.saves[k].value].storage if 0 <= k < len(graph.saves) else -1
        whole = sid in made and running.issuperset(possible.makers[sid])
        if sid not in possible.saves or not whole or k in taken:
            raise PlanError(f"burst {index}: what autograd saves as number {k} cannot be dropped")
        taken.add(k)
    pins: set[int] = set()
    handed: dict[int, int] = {}
    residents: set[int] = set()
    for op in burst.ops:
        writes = graph.ops[op].writes
        read = possible.inputs(op)
        for sid in read.union(w for w in writes if w in possible.makers) if writes else read:
            if sid in made:
                makers = possible.makers[sid]
                if len(makers) > 1 and any(m < op and m not in running for m in makers):
                    raise PlanError(f"burst {index}: operation {op} reads what is not made in full")
            elif graph.storages[sid].category in RESIDENT:
                residents.add(sid)
            else:
                _find_input(possible, index, op, sid, parent, found, pins, handed)
    found.append(None)  # type: ignore[arg-type]  # its place in walking order
    uses = [graph.saves[k].first_use for k in burst.drops]
    found[index] = PlacedBurst(
        index, burst, parent, made, frozenset(pins), handed, frozenset(residents), -1
    )
    inner = [_place(possible, child, index, found, taken) for child in burst.inner]
    used = [u for u in (*uses, *inner) if u >= 0]
    at = min(used, default=-1)
    placed = found[index]
    found[index] = PlacedBurst(
        index, burst, parent, made, placed.pins, handed, placed.residents, at
    )
    return at


def _find_input(
    possible: Recomputation,
    index: int,
    op: int,
    sid: int,
    parent: int,
    found: list[PlacedBurst],
    pins: set[int],
    handed: dict[int, int],
) -> None:
    """Enters where a burst gets an activation from that it does not make itself."""
    outer = parent
    while outer >= 0:
        if sid in found[outer].made:
            if op <= possible.last_write[sid] or not set(possible.makers[sid]) <= set(
                found[outer].burst.ops
            ):
                raise PlanError(f"burst {index}: operation {op} reads an unfinished result")
            handed[sid] = outer
            return
        outer = found[outer].parent
    if not possible.can_pin(sid, op):
        raise PlanError(f"burst {index}: nothing shows what operation {op} of this trace reads")
    pins.add(sid)
