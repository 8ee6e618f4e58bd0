"""What bursts change in a step: when they run, what they hold until then, what they leave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan
from actckpt.data.profile import Profile
from actckpt.interpreting.bursts import PlacedBurst, place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.stretches import Stretches
from actckpt.pricing.effect import GENERATOR_STATE_BYTES, Effect, Event


class BurstEffects:
    """Prices bursts of one graph."""

    def __init__(
        self,
        possible: Recomputation,
        profile: Profile,
        bytes_: np.ndarray,
        died: np.ndarray,
        workspace: np.ndarray,
    ) -> None:
        self.possible = possible
        self.stretches = Stretches(possible)
        self.graph: Graph = possible.graph
        self.profile = profile
        self.bytes = bytes_
        self.died = died
        self.workspace = workspace

    def effect(self, burst: Burst) -> Effect:
        """What an outermost burst and those inside it change.

        Raises:
            PlanError: it does not fit the graph.
        """
        placed = place_bursts(self.possible, Plan("", bursts=(burst,)))
        end = len(self.graph.ops)
        holds: dict[int, int] = {}
        handed_until: dict[tuple[int, int], int] = {}
        for p in placed:
            until = p.at if p.at >= 0 else end
            for sid in p.pins:
                holds[sid] = max(holds.get(sid, 0), until)
            for sid, giver in p.taken.items():
                key = (giver, sid)
                handed_until[key] = max(handed_until.get(key, 0), p.at)
        extra: list[tuple[int, int, int]] = []
        handed: list[tuple[int, int, int]] = []
        events: list[Event] = []
        for p in sorted((p for p in placed if p.at >= 0), key=lambda p: (p.at, p.index)):
            given = {sid: until for (giver, sid), until in handed_until.items() if giver == p.index}
            events.append(self._run(p, given, extra, handed))
        extra.extend(self._states(placed))
        dropped = sorted(k for p in placed for k in p.burst.drops)
        return Effect(
            dropped=np.array(dropped, dtype=np.int64),
            holds=tuple(holds.items()),
            extra=tuple(extra),
            handed=tuple(handed),
            events=tuple(events),
            seconds=tuple(self._seconds(p) for p in placed),
            dropped_bytes=tuple(self._dropped_bytes(p) for p in placed),
            calls=self.stretches.needed(placed),
        )

    def following_s(self, effects: Sequence[Effect]) -> float:
        """Seconds that a forward takes longer because calls that bursts depend on are followed."""
        calls = [e.calls for e in effects if e.calls is not None]
        if not calls:
            return 0.0
        compared, passed, stretches = self.stretches.count(np.unique(np.concatenate(calls)))
        profile = self.profile
        return profile.follow_s * compared + profile.pass_s * passed + profile.stretch_s * stretches

    def _run(
        self,
        p: PlacedBurst,
        given: dict[int, int],
        extra: list[tuple[int, int, int]],
        handed: list[tuple[int, int, int]],
    ) -> Event:
        """One burst: what it leaves behind, and its own highest level."""
        graph = self.graph
        stays: dict[int, int] = {}
        for k in p.burst.drops:
            save = graph.saves[k]
            if save.released > p.at:
                sid = graph.values[save.value].storage
                stays[sid] = max(stays.get(sid, 0), save.released)
        for sid, until in given.items():
            if until > stays.get(sid, p.at):
                handed.append((p.at, until, int(self.bytes[sid])))
                stays.pop(sid, None)
                stays[sid] = -1
        size = 0
        for sid, until in stays.items():
            size += int(self.bytes[sid])
            if until >= 0:
                extra.append((p.at, until, int(self.bytes[sid])))
        return Event(p.at, self._peak(p, set(stays)), size)

    def _peak(self, p: PlacedBurst, stays: set[int]) -> int:
        """Highest level inside a burst, counting only what it allocates itself."""
        graph, possible = self.graph, self.possible
        last_read: dict[int, int] = {}
        for n, op in enumerate(p.burst.ops):
            for sid in possible.inputs(op):
                last_read[sid] = n
        level = peak = 0
        alive: dict[int, int] = {}
        for n, op in enumerate(p.burst.ops):
            made = possible.outputs(op)
            for sid in made:
                if sid not in alive and graph.storages[sid].born == op:
                    alive[sid] = int(self.bytes[sid])
                    level += alive[sid]
            peak = max(peak, level + int(self.workspace[op]))
            for sid in (*possible.inputs(op), *made):
                if sid in alive and sid not in stays and last_read.get(sid, n) <= n:
                    level -= alive.pop(sid)
        return peak

    def _states(self, placed: Sequence[PlacedBurst]) -> list[tuple[int, int, int]]:
        """The generators' states that the forward keeps for random operations, one a call."""
        if self.graph.device != "cpu" or self.graph.stands_for:
            return []
        until: dict[int, int] = {}
        for p in placed:
            for call in {self.possible.call_of(i) for i in p.burst.ops if self.graph.ops[i].random}:
                until[call] = max(until.get(call, -1), p.at)
        begins = ((self.graph.calls[call].first, at) for call, at in until.items() if at >= 0)
        return [(begin, at + 1, GENERATOR_STATE_BYTES) for begin, at in begins]

    def _seconds(self, p: PlacedBurst) -> float:
        if p.at < 0:
            return 0.0
        costs, ops = self.profile.costs, self.graph.ops
        time_s = sum(costs[ops[i].signature].time_s for i in p.burst.ops)
        return (
            time_s
            + self.profile.burst_s
            + self.profile.burst_op_s * len(p.burst.ops)
            + self.profile.burst_save_s * len(p.burst.drops)
        )

    def _dropped_bytes(self, p: PlacedBurst) -> int:
        values, saves = self.graph.values, self.graph.saves
        return int(
            sum(self.bytes[s] for s in {values[saves[k].value].storage for k in p.burst.drops})
        )
