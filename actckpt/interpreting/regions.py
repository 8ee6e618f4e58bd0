"""A plan's regions, looked up in the graph: which stages, which saves, what a replay must run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from actckpt.data.graph import Category, Graph, Input
from actckpt.data.plan import Plan, Region
from actckpt.data.profile import Profile
from actckpt.errors import PlanError


@dataclass(frozen=True)
class Placed:
    """A region with its place in the graph.

    Attributes:
        index: position in ``Plan.walk()``.
        parent: index of the enclosing region, or -1.
        stages: ids of its sibling stages, in call order.
        own: the stages of ``stages`` that no child region takes over.
        split: for each stage of ``stages``, the child region that spans it, or -1.
        saves: indices in ``graph.saves`` of what autograd saves under this region itself and not
            under a child, parameters and buffers apart, in order: their position is their number
            at run time.
        kept: those of ``saves`` that stay resident because the plan saves the operation.
        captured: operations that the plan saves though autograd does not save their outputs.
        inputs: storages that the region holds until it has been recomputed.
    """

    index: int
    region: Region
    parent: int
    depth: int
    stages: tuple[int, ...]
    split: tuple[int, ...]
    saves: tuple[int, ...]
    kept: frozenset[int]
    captured: frozenset[int]
    inputs: tuple[int, ...]

    @cached_property
    def own(self) -> tuple[int, ...]:
        return tuple(s for s, child in zip(self.stages, self.split, strict=True) if child < 0)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The saves that are recomputed."""
        return tuple(s for s in self.saves if s not in self.kept)


def place(graph: Graph, plan: Plan) -> tuple[Placed, ...]:
    """Every region of ``plan`` in its place, in ``Plan.walk()`` order.

    Raises:
        PlanError: a region names a stage that the graph does not have, spans stages that are no
            consecutive siblings or are not linked, overlaps another one, or may not be recomputed.
    """
    return _Placer(graph).place(plan)


def siblings(graph: Graph, region: Region, ids: dict[tuple[str, int], int]) -> tuple[int, ...]:
    """Ids of the stages that a region spans, in call order."""
    try:
        first, last = ids[region.first], ids[region.last]
    except KeyError as error:
        raise PlanError(f"region {region.label}: the model has no call {error}") from None
    parent = graph.stages[first].parent
    if graph.stages[last].parent != parent or last < first:
        raise PlanError(
            f"region {region.label}: first and last must be calls of the same parent, in order"
        )
    return tuple(i for i in range(first, last + 1) if graph.stages[i].parent == parent)


def is_linked(graph: Graph, earlier: tuple[int, ...], stage: int) -> bool:
    """Whether ``stage`` can follow ``earlier`` in one region.

    Each of its tensors is what a stage of ``earlier`` returned, or older than ``earlier``.
    """
    begin = graph.stages[earlier[0]].first
    linked = False
    for argument in graph.stages[stage].inputs:
        if argument.source is not None and argument.source[0] in earlier:
            linked = True
        elif graph.storages[argument.storage].born >= begin:
            return False
    return linked


class _Placer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids = graph.stage_ids
        self.found: list[Placed] = []

    def place(self, plan: Plan) -> tuple[Placed, ...]:
        end = -1
        for region in plan.regions:
            placed = self._place(region, -1, 0)
            first = self.graph.stages[placed.stages[0]].first
            if placed.stages[0] <= end and first < self.graph.stages[end].last:
                raise PlanError(f"region {region.label} overlaps the one before it")
            end = placed.stages[-1]
        return tuple(self.found)

    def _place(self, region: Region, parent: int, depth: int) -> Placed:
        graph = self.graph
        stages = siblings(graph, region, self.ids)
        for position, sid in enumerate(stages):
            stage = graph.stages[sid]
            if stage.refusal:
                raise PlanError(f"region {region.label}: {stage.path} {stage.refusal}")
            if stage.mutates:
                raise PlanError(f"region {region.label}: {stage.path} changes an argument in place")
            if position and not is_linked(graph, stages[:position], sid):
                raise PlanError(
                    f"region {region.label} cannot span {stage.path}: it is not called with what "
                    "the stages before it returned, but with something computed in between"
                )
        index = len(self.found)
        self.found.append(None)  # type: ignore[arg-type]  # its place in walking order
        split = [-1] * len(stages)
        inside: list[tuple[int, int]] = []
        reached = -1
        for child in region.regions:
            number = len(self.found)
            placed = self._place(child, index, depth + 1)
            if not self._contains(stages, placed.stages):
                raise PlanError(f"region {child.label} is not inside region {region.label}")
            if placed.stages[0] <= reached:
                raise PlanError(f"region {child.label} overlaps the one before it")
            reached = placed.stages[-1]
            for sid in placed.stages:
                if sid in stages:
                    split[stages.index(sid)] = number
                stage = graph.stages[sid]
                inside.append((stage.first_save, stage.last_save))
        saves = tuple(
            k
            for sid in stages
            for k in range(graph.stages[sid].first_save, graph.stages[sid].last_save)
            if not any(a <= k < b for a, b in inside) and not self._is_resident(k)
        )
        kept, captured = self._kept(region, saves)
        placed = Placed(
            index, region, parent, depth, stages, tuple(split), saves, kept, captured,
            self._inputs(stages),
        )  # fmt: skip
        self.found[index] = placed
        return placed

    def _contains(self, stages: tuple[int, ...], inner: tuple[int, ...]) -> bool:
        if all(s in stages for s in inner):
            return True
        return any(a in stages for a in self.graph.ancestors(self.graph.stages[inner[0]].parent))

    def _is_resident(self, save: int) -> bool:
        sid = self.graph.values[self.graph.saves[save].value].storage
        category = self.graph.storages[sid].category if sid >= 0 else None
        return category in (Category.PARAMETER, Category.BUFFER)

    def _inputs(self, stages: tuple[int, ...]) -> tuple[int, ...]:
        held: dict[int, None] = {}
        for sid in stages:
            argument: Input
            for argument in self.graph.stages[sid].inputs:
                if argument.source is None or argument.source[0] not in stages:
                    held[argument.storage] = None
        return tuple(held)

    def _kept(
        self, region: Region, saves: tuple[int, ...]
    ) -> tuple[frozenset[int], frozenset[int]]:
        if not region.saved:
            return frozenset(), frozenset()
        graph = self.graph
        by_storage: dict[int, list[int]] = {}
        for k in saves:
            by_storage.setdefault(graph.values[graph.saves[k].value].storage, []).append(k)
        kept: set[int] = set()
        captured: set[int] = set()
        for saved in region.saved:
            op = self._find(region, saved.path, saved.call, saved.name, saved.nth)
            outputs = [graph.values[v].storage for v in graph.ops[op].outputs]
            created = [s for s in outputs if graph.storages[s].born == op]
            # an in-place operation's result is the storage as it stands afterwards
            changed = [s for s in outputs if s in graph.ops[op].writes]
            packed = [
                k
                for s in (*created, *changed)
                for k in by_storage.get(s, ())
                if graph.saves[k].at > op
            ]
            kept.update(packed)
            if created and not packed:
                captured.add(op)
        return frozenset(kept), frozenset(captured)

    def _find(self, region: Region, path: str, call: int, name: str, nth: int) -> int:
        sid = self.ids.get((path, call))
        if sid is not None:
            stage, seen = self.graph.stages[sid], 0
            for index in range(stage.first, stage.last):
                op = self.graph.ops[index]
                if op.stage == sid and op.name == name:
                    if seen == nth:
                        return index
                    seen += 1
        raise PlanError(f"region {region.label}: {path}#{call} has no call {nth} of {name}")


@dataclass(frozen=True, slots=True)
class Replay:
    """What the recomputation of one region runs.

    Attributes:
        ops: the operations of its stages in order, up to the early stop.
        needed: those of ``ops`` that must run; the others may get placeholders.
        cached: storages that a skipped operation returns from what was kept.
        stop: position in ``graph.ops`` at which the last dropped tensor exists.
    """

    ops: tuple[int, ...]
    needed: frozenset[int]
    cached: frozenset[int]
    stop: int


def replay_of(graph: Graph, placed: Placed) -> Replay:
    """The operations that recomputing ``placed`` runs, and which of them nobody needs.

    Random operations are needed up to the last needed one, so that the stream lines up. A kept
    storage that is written after its creation stands in for its final state only: if a needed
    operation reads an earlier state, the storage is recomputed.
    """
    dropped = placed.dropped
    stop = max((graph.saves[k].at for k in dropped), default=-1)
    ops = tuple(
        i
        for sid in placed.stages
        for i in range(graph.stages[sid].first, min(graph.stages[sid].last, stop))
    )
    # storages of whatever cannot be skipped are made again, kept or not
    fixed = {
        s
        for i in ops
        if not graph.ops[i].view and not is_skippable(graph, i)
        for s in _made(graph, i)
    }
    available = {graph.values[graph.saves[k].value].storage for k in placed.kept}
    reached = set(ops)
    for op in placed.captured & reached:
        created = (graph.values[v].storage for v in graph.ops[op].outputs)
        available.update(s for s in created if graph.storages[s].born == op)
    available -= fixed
    # a kept tensor that is written after it was saved is not the state that the replay needs: by
    # the replay's own operations, by what comes after them in the region, or after the region
    returned = {graph.values[v].storage for s in placed.stages for v in graph.stages[s].outputs}
    end = graph.stages[placed.stages[-1]].last
    if not available.isdisjoint(returned):
        end = graph.forward_end
    for index in range(graph.stages[placed.stages[0]].first, end):
        for w in graph.ops[index].writes:
            if w in available and _saved_before(graph, placed, w, index):
                available.discard(w)
    inside = range(graph.stages[placed.stages[0]].first, graph.stages[placed.stages[-1]].last)
    # also where a replay stops before: what was kept has seen it
    last_write = {w: i for i in inside for w in graph.ops[i].writes}
    while True:
        needed = _needed(graph, dropped, ops, available)
        stale = _read_too_early(graph, needed, available, last_write)
        if not stale:
            return Replay(ops, needed, frozenset(available), stop)
        available -= stale


def is_skippable(graph: Graph, index: int) -> bool:
    """Whether a replay can return something else in place of an operation's results.

    The results are new tensors, or the one argument that the operation changes in place.
    """
    op = graph.ops[index]
    if op.view or not op.outputs or not op.plain:
        return False
    if is_in_place(graph, index):
        return len(op.outputs) == 1
    return all(graph.storages[graph.values[v].storage].born == index for v in op.outputs)


def is_in_place(graph: Graph, index: int) -> bool:
    """Whether an operation returns an argument that it changed (BatchNorm's statistics are not)."""
    op = graph.ops[index]
    return any(graph.values[v].storage in op.writes for v in op.outputs)


def _made(graph: Graph, index: int) -> set[int]:
    op = graph.ops[index]
    return {graph.values[v].storage for v in op.outputs}.union(op.writes)


def _saved_before(graph: Graph, placed: Placed, storage: int, op: int) -> bool:
    return any(
        graph.saves[k].at <= op and graph.values[graph.saves[k].value].storage == storage
        for k in placed.kept
    ) or any(
        storage in (graph.values[v].storage for v in graph.ops[c].outputs) for c in placed.captured
    )


# random operations that draw the same numbers whatever is in their arguments; others look at them:
# a probability must be one, and who rejects samples draws as often as it has to
_BLIND = tuple(
    f"aten.{name}"
    for name in (
        "_fused_dropout", "_scaled_dot_product", "bernoulli_.float", "cauchy_", "exponential_",
        "geometric_", "log_normal_", "native_dropout", "normal_.", "rand_like", "randint_like",
        "randn_like", "random_", "uniform_",
    )
)  # fmt: skip


def _needed(
    graph: Graph, dropped: tuple[int, ...], ops: tuple[int, ...], available: set[int]
) -> frozenset[int]:
    wanted = {graph.values[graph.saves[k].value].storage for k in dropped} - available
    needed: set[int] = set()
    draws = False
    for index in reversed(ops):
        op = graph.ops[index]
        made = _made(graph, index)
        if op.asked or (not op.view and not wanted.isdisjoint(made)):
            draws = draws or op.random
        elif not (draws and op.random):
            continue
        elif op.name.startswith(_BLIND):
            needed.add(index)
            continue
        needed.add(index)
        wanted.update(graph.values[v].storage for v in op.inputs)
        wanted -= available
    return frozenset(needed)


def _read_too_early(
    graph: Graph, needed: frozenset[int], available: set[int], last_write: dict[int, int]
) -> set[int]:
    return {
        s
        for i in needed
        for s in (graph.values[v].storage for v in graph.ops[i].inputs)
        if s in available and i < last_write.get(s, -1)
    }


# following the trace costs as much as the bare mode: 13 us per operation where a mode took 7
_FOLLOWING = 2


def pruning_gain_s(graph: Graph, placed: Placed, replay: Replay, profile: Profile) -> float:
    """Seconds per step that skipping the unneeded operations of a replay saves (may be negative).

    Skipping takes a dispatch mode over the whole replay, capturing one over the forward pass, too.
    Regions with regions inside are never pruned, their gain is 0.
    """
    if placed.region.regions or not placed.dropped:
        return 0.0
    skipped = (op for op in replay.ops if op not in replay.needed and is_skippable(graph, op))
    passes = 2 if placed.captured else 1
    mode_s = passes * _FOLLOWING * profile.dispatch_s * len(replay.ops)
    return sum(profile.costs[graph.ops[op].signature].time_s for op in skipped) - mode_s
