"""What the engine takes at least beside operations' own time, in plans of either kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actckpt.interpreting.stretches import Stretches
from actckpt.pricing.simulate import Pricer


@dataclass(frozen=True, slots=True)
class Engine:
    """What every plan of one kind pays: terms of a linear program.

    Beside the program's own columns (what is resident, which operations run again) it may have
    some between 0 and 1.

    Attributes:
        remade_s: storage -> seconds, where it is not resident when the forward ends.
        again_s: seconds of every operation that runs again.
        columns_s: seconds of each column of its own.
        saved: (column, storage): the column is 1 where the storage is not resident then.
        again: (column, operation): it is 1 where the operation runs again.
        rows: sums of (column, factor) that are not below 0.
    """

    remade_s: Mapping[int, float]
    again_s: float = 0.0
    columns_s: Sequence[float] = ()
    saved: Sequence[tuple[int, int]] = ()
    again: Sequence[tuple[int, int]] = ()
    rows: Sequence[tuple[tuple[int, float], ...]] = ()


def by_operations(pricer: Pricer, saves: Mapping[int, Collection[int]]) -> Engine:
    """Each save is filled in, each operation fetched; the calls that they belong to are followed.

    A call is compared if a save that is made again belongs to it, or an operation that runs again.
    It is seen then, and so is the one before it, unless following is taken up where a module's
    forward begins or ends between the two. Only what a single burst takes is left out.

    Args:
        saves: the numbers of each storage's saves that backward needs.
    """
    calls, profile = pricer.graph.calls, pricer.profile
    count = len(calls)
    starts = sorted({int(at) for at in Stretches(pricer.possible).starts if at < count})
    # columns: whether each call is compared, whether it is seen, whether following begins before it
    compared, seen = range(count), range(count, 2 * count)
    begins = {at: 2 * count + n for n, at in enumerate(starts)}
    rows: list[tuple[tuple[int, float], ...]] = []
    for n in range(count):
        rows.append(((seen[n], 1.0), (compared[n], -1.0)))
        why = [(begins[n], 1.0)] if n in begins else []
        if n:
            why.append((seen[n - 1], 1.0))
        rows.append(((seen[n], -1.0), *why))
    call_of = {k: n for n, c in enumerate(calls) for k in range(c.first_save, c.last_save)}
    columns_s = np.repeat(
        (profile.follow_s - profile.pass_s, profile.pass_s, profile.stretch_s),
        (count, count, len(starts)),
    )
    return Engine(
        {sid: profile.burst_save_s * len(numbers) for sid, numbers in saves.items()},
        again_s=profile.burst_op_s,
        columns_s=columns_s.tolist(),
        saved=[
            (call_of[k], sid) for sid, numbers in saves.items() for k in numbers if k in call_of
        ],
        again=[(n, i) for n, call in enumerate(calls) for i in range(call.first, call.last)],
        rows=rows,
    )


def by_calls(pricer: Pricer, saved: Collection[int], room_bytes: int) -> Engine:
    """Each is filled in, or handed to a region inside another as one of so many inputs at most.

    All that a region's replay brings is there at once, so there are regions enough for all. What
    is left of a region when its inputs are paid for is divided by bytes.

    Args:
        saved: storages that backward needs as they were saved.
        room_bytes: no more than this is ever there of what was made again.
    """
    graph, profile = pricer.graph, pricer.profile
    given: dict[int, int] = {}
    for stage in graph.stages:
        for argument in stage.inputs:
            given[argument.storage] = max(given.get(argument.storage, -1), stage.first)
    inputs = np.zeros(pricer.count + 2, dtype=np.int64)
    for sid in saved:
        born = int(pricer.born[sid])
        inputs[born + 1] += 1
        inputs[max(born, given.get(sid, -1)) + 1] -= 1
    most = max(1, int(np.cumsum(inputs).max()))
    each_s = min(profile.save_s, profile.region_s / most)
    byte_s = (profile.region_s - most * each_s) / max(1, room_bytes)
    return Engine({sid: each_s + byte_s * int(pricer.bytes[sid]) for sid in saved})
