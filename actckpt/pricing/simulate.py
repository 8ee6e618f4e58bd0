"""The price of a plan: the memory and the time of a step, without running anything."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from actckpt.data.graph import Category, Graph
from actckpt.data.plan import Burst, Plan, Region
from actckpt.data.profile import Profile
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.regions import Placed, Replay, place, pruning_gain_s, replay_of
from actckpt.pricing.burst_effect import BurstEffects
from actckpt.pricing.effect import GENERATOR_STATE_BYTES, Effect, Event
from actckpt.pricing.price import Price


def price(graph: Graph, profile: Profile, plan: Plan) -> Price:
    """What a step under ``plan`` is predicted to need.

    Every storage is an interval of operations; a region shortens the intervals of what it drops
    and adds others at the instant of its recomputation. O(storages + saves in regions).

    Raises:
        PlanError: the plan does not fit the graph.
    """
    return Pricer(graph, profile).price(plan)


@dataclass(slots=True)
class _Tree:
    """A region with what happens to it during the simulation."""

    placed: Placed
    replay: Replay
    children: list[_Tree] = field(default_factory=list)
    parent: _Tree | None = None
    ready: bool = False
    filled: bool = False
    first_use: int = -1
    last_use: int = -1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A price as policies compare it: ``timeline`` has one level per operation."""

    peak_bytes: int
    added_bytes: int
    time_s: float
    following_s: float
    timeline: np.ndarray
    effects: tuple[Effect, ...]

    @property
    def peak_at(self) -> int:
        """Index of the operation at which the peak is reached."""
        return int(np.argmax(self.timeline)) if len(self.timeline) else 0


class Pricer:
    """Prices many plans of one graph: what does not depend on the plan is computed once."""

    def __init__(self, graph: Graph, profile: Profile) -> None:
        self.graph = graph
        self.profile = profile
        n = len(graph.ops)
        self.count = n
        costs = profile.costs
        self.time_s = np.array([costs[op.signature].time_s for op in graph.ops], dtype=float)
        self.workspace = np.array(
            [costs[op.signature].workspace_bytes for op in graph.ops], dtype=np.int64
        )
        self.bytes = np.array([s.bytes for s in graph.storages], dtype=np.int64)
        self.born = np.array([s.born for s in graph.storages], dtype=np.int64)
        self.died = np.array([s.died for s in graph.storages], dtype=np.int64)
        self.save_storage = [graph.values[s.value].storage for s in graph.saves]
        # of the saves that have a storage at all (sparse tensors have none)
        self.stored = np.array(
            [k for k, sid in enumerate(self.save_storage) if sid >= 0], dtype=np.int64
        )
        self.released = np.array([s.released for s in graph.saves], dtype=np.int64)
        self._effects: dict[Region | Burst, Effect] = {}
        self.by_birth: dict[int, list[int]] = {}
        for sid, born in enumerate(self.born):
            self.by_birth.setdefault(int(born), []).append(sid)
        self.free = np.zeros(n + 1, dtype=np.int64)  # residents and arrived gradients
        for s in graph.storages:
            if s.born < 0:
                self.free[0] += s.bytes
                self.free[min(s.died, n)] -= s.bytes
            elif s.category is Category.GRADIENT and s.settled >= 0:
                self.free[min(s.settled, n)] += s.bytes
                self.free[min(s.died, n)] -= s.bytes
        self.free = np.cumsum(self.free)

    @cached_property
    def ends(self) -> np.ndarray:
        """Operation at whose end an untouched step lets go of each storage."""
        found = self.died.copy()
        saved = np.array(self.save_storage, dtype=np.int64)[self.stored]
        np.maximum.at(found, saved, self.released[self.stored])
        return np.clip(found, 0, self.count)

    @cached_property
    def possible(self) -> Recomputation:
        """What can be recomputed by operations."""
        return Recomputation(self.graph)

    @cached_property
    def _bursts(self) -> BurstEffects:
        return BurstEffects(self.possible, self.profile, self.bytes, self.died, self.workspace)

    def price(self, plan: Plan) -> Price:
        """As `actckpt.pricing.simulate.price`.

        Raises:
            PlanError: the plan does not fit the graph.
        """
        place_bursts(self.possible, plan)
        place(self.graph, plan)  # regions must not overlap, which `estimate` takes for granted
        found = self.estimate(plan)
        return Price(
            peak_bytes=found.peak_bytes,
            added_bytes=found.added_bytes,
            time_s=found.time_s,
            following_s=found.following_s,
            timeline=tuple(int(x) for x in found.timeline),
            peak_at=found.peak_at,
            region_bytes=tuple(b for e in found.effects for b in e.dropped_bytes),
            region_s=tuple(t for e in found.effects for t in e.seconds),
        )

    def estimate(self, plan: Plan) -> Estimate:
        """The price of a plan whose regions are disjoint; what a region does is computed once.

        Raises:
            PlanError: a region does not fit the graph.
        """
        parts: tuple[Region | Burst, ...] = (*plan.regions, *plan.bursts)
        effects = tuple(self._effect(part) for part in parts)
        end = self.died.copy()
        saved = np.ones(len(self.graph.saves), dtype=bool)
        for effect in effects:
            saved[effect.dropped] = False
        kept = self.stored[saved[self.stored]]
        np.maximum.at(end, np.array(self.save_storage, dtype=np.int64)[kept], self.released[kept])
        holds = [hold for effect in effects for hold in effect.holds]
        for sid, until in holds:
            end[sid] = max(end[sid], until)
        # what goes at the end of a recomputation is there during it
        during = np.zeros(self.count + 1, dtype=np.int64)
        for sid, until in set(holds):
            if end[sid] == until:
                during[until] += self.bytes[sid]
        starts, stops = np.maximum(self.born, 0), np.clip(end, 0, self.count)
        level = np.zeros(self.count + 1, dtype=np.int64)
        np.add.at(level, starts, self.bytes)
        np.add.at(level, stops, -self.bytes)
        begun = np.zeros(self.count + 1, dtype=np.int64)  # what begins to exist at each operation
        alive = (self.born >= 0) & (stops > starts)
        np.add.at(begun, starts[alive], self.bytes[alive])
        for effect in effects:
            for start, stop, size in effect.handed:
                if stop > start:
                    during[min(stop, self.count)] += size
            for start, stop, size in (*effect.extra, *effect.handed):
                if stop > start:
                    level[start] += size
                    level[min(stop, self.count)] -= size
                    begun[start] += size
        level = np.cumsum(level)
        events = [event for effect in effects for event in effect.events]
        before = level - begun + during
        timeline = self._merge(level[: self.count] + self.workspace, before, events)
        following_s = self._bursts.following_s(effects) if plan.bursts else 0.0
        return Estimate(
            peak_bytes=int(timeline.max(initial=0)),
            added_bytes=int((timeline - self.free[: self.count]).max(initial=0)),
            time_s=float(self.time_s.sum() + sum(sum(e.seconds) for e in effects) + following_s),
            following_s=following_s,
            timeline=timeline,
            effects=effects,
        )

    def _effect(self, part: Region | Burst) -> Effect:
        found = self._effects.get(part)
        if found is None and isinstance(part, Burst):
            found = self._effects[part] = self._bursts.effect(part)
        elif found is None:
            assert isinstance(part, Region)
            region = part
            trees = self._forest(place(self.graph, Plan("", (region,))))
            dropped, holds = self._kept(trees)
            extra: list[tuple[int, int, int]] = []
            handed: list[tuple[int, int, int]] = []
            events: list[Event] = []
            seconds = self._replay_all(trees, extra, handed, events)
            found = self._effects[region] = Effect(
                dropped=np.array(sorted(dropped), dtype=np.int64),
                holds=tuple(holds.items()),
                extra=tuple(extra),
                handed=tuple(handed),
                events=tuple(events),
                seconds=tuple(seconds),
                dropped_bytes=tuple(self._dropped_bytes(t) for t in trees),
            )
        return found

    # ---- structure

    def _forest(self, placed: tuple[Placed, ...]) -> list[_Tree]:
        trees = [_Tree(p, replay_of(self.graph, p)) for p in placed]
        for tree in trees:
            saves = [self.graph.saves[k] for k in tree.placed.dropped]
            used = [s.first_use for s in saves if s.first_use >= 0]
            tree.first_use = min(used, default=-1)
            if tree.placed.parent >= 0:
                tree.parent = trees[tree.placed.parent]
                tree.parent.children.append(tree)
            else:
                tree.ready = True
        for tree in reversed(trees):
            tree.last_use = max([tree.first_use, *(c.last_use for c in tree.children)], default=-1)
        return trees

    def _begin(self, tree: _Tree) -> int:
        """Operation at which the outermost region around ``tree`` begins."""
        while tree.parent is not None:
            tree = tree.parent
        return self.graph.stages[tree.placed.stages[0]].first

    def _released(self, tree: _Tree, storage: int) -> int:
        saves = (k for k in tree.placed.saves if self.save_storage[k] == storage)
        own = max((self.graph.saves[k].released for k in saves), default=-1)
        first = (c for c in tree.children if storage in c.placed.inputs)
        return max([own, *(self._released(c, storage) for c in first)])

    def _state_bytes(self, tree: _Tree) -> int:
        """Bytes of the random state that a region keeps to draw the same again."""
        stages = (self.graph.stages[sid] for sid in tree.placed.stages)
        random = any(op.random for s in stages for op in self.graph.ops[s.first : s.last])
        on_cpu = self.graph.device == "cpu" and not self.graph.stands_for
        return GENERATOR_STATE_BYTES if random and on_cpu else 0

    def _dropped_bytes(self, tree: _Tree) -> int:
        return int(sum(self.bytes[s] for s in {self.save_storage[k] for k in tree.placed.dropped}))

    # ---- what the forward pass keeps

    def _kept(self, trees: list[_Tree]) -> tuple[set[int], dict[int, int]]:
        """The saves that a region tree drops, and until when it holds which storages."""
        dropped: set[int] = set()
        holds: dict[int, int] = {}
        for tree in trees:
            inputs = set(tree.placed.inputs)
            begin = self._begin(tree)
            # what came from outside the whole tree is held: autograd's alias of it costs nothing
            dropped.update(
                k
                for k in tree.placed.dropped
                if not (self.save_storage[k] in inputs and self.born[self.save_storage[k]] < begin)
            )
            held: list[tuple[int, int]] = []
            if tree.parent is None:
                held.extend((sid, tree.last_use) for sid in inputs)
            if pruning_gain_s(self.graph, tree.placed, tree.replay, self.profile) > 0:
                # a pruned replay reads what was kept
                held.extend((sid, tree.first_use) for sid in tree.replay.cached)
            for sid, until in held:
                holds[sid] = max(holds.get(sid, 0), until)
        return dropped, holds

    # ---- what the backward pass recomputes

    def _replay_all(
        self,
        trees: list[_Tree],
        extra: list[tuple[int, int, int]],
        handed: list[tuple[int, int, int]],
        events: list[Event],
    ) -> list[float]:
        seconds = {id(t): 0.0 for t in trees}
        for tree in sorted((t for t in trees if t.first_use >= 0), key=lambda t: t.first_use):
            if tree.filled:
                continue
            path = [tree]
            while not path[-1].ready and path[-1].parent is not None:
                path.append(path[-1].parent)
            for node in reversed(path):
                seconds[id(node)] += self._replay(node, tree.first_use, extra, handed, events)
        for tree in trees:
            if tree.parent is None and tree.last_use >= 0:
                first = self.graph.stages[tree.placed.stages[0]].first
                if self._state_bytes(tree):
                    extra.append((first, tree.last_use + 1, self._state_bytes(tree)))
        return [seconds[id(t)] for t in trees]

    def _replay(
        self,
        tree: _Tree,
        at: int,
        extra: list[tuple[int, int, int]],
        handed: list[tuple[int, int, int]],
        events: list[Event],
    ) -> float:
        """Recomputes one region before operation ``at``; returns its seconds."""
        stays = 0
        stop = -1
        fills: dict[int, int] = {}
        for k in tree.placed.dropped:
            save = self.graph.saves[k]
            if save.released > at:
                sid = self.save_storage[k]
                fills[sid] = max(fills.get(sid, 0), save.released)
                stop = max(stop, save.at)
        inputs = set(tree.placed.inputs)
        for sid in inputs & set(fills):
            fills.pop(sid)  # an input comes back as itself
        staying = set(fills)
        stages = self.graph.stages
        for child in tree.children:
            if child.ready or child.last_use < at:
                continue
            child.ready = True
            if self._state_bytes(child):
                extra.append((at, child.last_use + 1, self._state_bytes(child)))
            spanned = child.placed.stages[0] in tree.placed.stages
            stop = max(stop, stages[child.placed.stages[0 if spanned else -1]].first)
            for sid in child.placed.inputs:
                # what the region itself was handed is there already
                if self.born[sid] >= self._begin(tree) and sid not in inputs:
                    # until the region has come back, and as long as it is saved in it, too
                    released = self._released(child, sid)
                    until = max(child.last_use, released)
                    kept = extra if released > child.last_use else handed
                    kept.append((at, until, int(self.bytes[sid])))
                    stays += int(self.bytes[sid])
                    staying.add(sid)
        for sid, released in fills.items():
            extra.append((at, released, int(self.bytes[sid])))
            stays += int(self.bytes[sid])
        tree.filled = True
        ops = [
            i
            for stage in tree.placed.stages
            for i in range(self.graph.stages[stage].first, min(self.graph.stages[stage].last, stop))
        ]
        gain_s = pruning_gain_s(self.graph, tree.placed, tree.replay, self.profile)
        pruned = tree.replay if gain_s > 0 else None
        # the state of the generator is set aside meanwhile
        peak = self._inner_peak(ops, staying, pruned) + self._state_bytes(tree)
        events.append(Event(at, peak, stays))
        time_s = float(self.time_s[ops].sum()) + self.profile.region_s
        time_s += self.profile.save_s * len(fills)
        return time_s - max(0.0, gain_s)

    def _inner_peak(self, ops: list[int], staying: set[int], pruned: Replay | None) -> int:
        """Highest level inside a recomputation, counting only what it allocates itself.

        A pruned one returns what was kept instead of making it again, and placeholders from what
        it skips.
        """
        level = peak = 0
        dying: list[tuple[int, int]] = []  # heap of (operation before which it goes, bytes)
        for i in ops:
            while dying and dying[0][0] <= i:
                level -= heapq.heappop(dying)[1]
            for sid in self.by_birth.get(i, ()):
                if pruned is not None and sid in pruned.cached:
                    continue
                size = int(self.bytes[sid])
                level += size
                if sid not in staying:
                    heapq.heappush(dying, (int(self.died[sid]), size))
            runs = pruned is None or i in pruned.needed
            peak = max(peak, level + (int(self.workspace[i]) if runs else 0))
        return peak

    def _merge(
        self,
        timeline: np.ndarray,
        before: np.ndarray,
        events: list[Event],
    ) -> np.ndarray:
        """The timeline with each recomputation at the operation before which it happens.

        Args:
            before: level before each operation, without what recomputations there make.
        """
        timeline = timeline.copy()
        settled: dict[int, int] = {}
        for event in events:
            if event.at >= self.count:
                continue
            level = int(before[event.at]) + settled.get(event.at, 0)
            timeline[event.at] = max(timeline[event.at], level + event.peak_bytes)
            settled[event.at] = settled.get(event.at, 0) + event.stays_bytes
        return timeline
