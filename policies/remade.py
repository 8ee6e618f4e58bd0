"""What the engine takes at least for each saved result that is made again, in any plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from actckpt.policies.makers import Makers
from actckpt.pricing.simulate import Pricer


def least_remade_s(
    pricer: Pricer, makers: Makers, saved: Collection[int], room_bytes: int
) -> dict[int, float]:
    """Seconds beside the operations' own, by storage: what any plan pays for those it remakes.

    A plan recomputes by operations or by calls, so each is charged the lesser of the two.

    Args:
        saved: storages that backward needs as they were saved.
        room_bytes: no more than this is ever there of what was made again.
    """
    operations = _by_operations(pricer, makers, saved)
    calls = _by_calls(pricer, saved, room_bytes)
    return {sid: min(operations[sid], calls[sid]) for sid in saved}


def _by_operations(pricer: Pricer, makers: Makers, saved: Collection[int]) -> dict[int, float]:
    """Each is filled in, its maker runs, and the call that saved it is compared.

    What several share is divided among them.
    """
    graph, profile = pricer.graph, pricer.profile
    made = Counter(makers.of[sid][0] for sid in saved)
    found = {
        sid: profile.burst_save_s + profile.burst_op_s / made[makers.of[sid][0]] for sid in saved
    }
    followed = dict.fromkeys(saved, profile.follow_s)
    inside: set[int] = set()
    for call in graph.calls:
        numbers = range(call.first_save, call.last_save)
        inside.update(numbers)
        sids = {pricer.save_storage[k] for k in numbers}.intersection(saved)
        for sid in sids:
            followed[sid] = min(followed[sid], profile.follow_s / len(sids))
    for k, sid in enumerate(pricer.save_storage):
        if k not in inside and sid in followed:
            followed[sid] = 0.0  # no call saves it: all are compared, whatever else there is
    return {sid: found[sid] + followed[sid] for sid in saved}


def _by_calls(pricer: Pricer, saved: Collection[int], room_bytes: int) -> dict[int, float]:
    """Each is filled in, or handed to a region inside another as one of so many inputs at most.

    All that a region's replay brings is there at once, so there are regions enough for all. What
    is left of a region when its inputs are paid for is divided by bytes.
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
    return {sid: each_s + byte_s * int(pricer.bytes[sid]) for sid in saved}
