"""A plan compiled for one model: what each patched module call does at run time."""

from __future__ import annotations

from dataclasses import dataclass, field

from actckpt.data.brief import brief
from actckpt.data.graph import Category, Graph
from actckpt.data.plan import Key, Plan
from actckpt.data.profile import Profile
from actckpt.interpreting.regions import Placed, place, replay_of
from actckpt.rewriting.pruning import Pruning, pruning_of
from actckpt.rewriting.schedule import Schedule, compile_bursts

Leaf = tuple[int, int]
_SCALAR_BYTES = 16  # one number of the widest dtype


@dataclass(frozen=True, slots=True)
class StageProgram:
    """One stage of a region.

    Attributes:
        chain: indices of the regions that span it as a sibling, outermost first.
        links: number of its tensor argument -> (position in the outermost region, output leaf).
        random: whether torch's generators must be recorded when the stage begins.
        generators: Python-side generators that it moves ("python", "numpy").
        buffers: (module path, buffer name, whether its value is read before it is written).
        touches: (module path, attribute) pairs that its forward rebinds.
        inner: paths of patched modules below it, whose call counters a replay must rewind.
    """

    key: Key
    chain: tuple[int, ...]
    links: dict[int, Leaf]
    random: bool
    moves_random: bool
    generators: tuple[str, ...]
    buffers: tuple[tuple[str, str, bool], ...]
    touches: tuple[tuple[str, str], ...]
    inner: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RegionProgram:
    """One region: which of its numbered saves stay, which operations are captured or pruned."""

    index: int
    label: str
    parent: int
    keep: frozenset[int]
    saves: int
    pruning: Pruning | None
    pieces: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """Everything that the rewritten model looks up at run time."""

    regions: tuple[RegionProgram, ...] = ()
    stages: dict[Key, StageProgram] = field(default_factory=dict)
    schedule: Schedule | None = None

    __repr__ = brief

    @property
    def paths(self) -> frozenset[str]:
        """Paths of the modules to patch."""
        turns = self.schedule.turns if self.schedule is not None else {}
        return frozenset(path for path, _ in (*self.stages, *turns))


def compile_plan(graph: Graph, plan: Plan, profile: Profile | None = None) -> Program:
    """The program of a plan.

    Args:
        profile: decides whether skipping operations pays; None never skips.

    Raises:
        PlanError: the plan does not fit the graph (`actckpt.interpreting.regions.place`).
    """
    placed = place(graph, plan)
    stages: dict[Key, StageProgram] = {}
    patched = {graph.stages[s].key for p in placed for s in p.stages}
    for p in placed:
        top = p.parent < 0 or not set(p.stages) & set(placed[p.parent].stages)
        if top:
            _compile_chain(graph, placed, p, patched, stages)
    regions = tuple(_compile_region(graph, p, profile) for p in placed)
    return Program(regions, stages, compile_bursts(graph, plan))


def _compile_region(graph: Graph, p: Placed, profile: Profile | None) -> RegionProgram:
    number = {save: n for n, save in enumerate(p.saves)}
    return RegionProgram(
        index=p.index,
        label=p.region.label,
        parent=p.parent,
        keep=frozenset(number[k] for k in p.kept),
        saves=len(p.saves),
        pruning=pruning_of(graph, p, replay_of(graph, p), profile),
    )


def _compile_chain(
    graph: Graph,
    placed: tuple[Placed, ...],
    outer: Placed,
    patched: set[Key],
    stages: dict[Key, StageProgram],
) -> None:
    """Enters the stages that ``outer`` spans; its split children span parts of them."""
    fresh = False  # whether the generator stands where the replay of the stages before leaves it
    for position, sid in enumerate(outer.stages):
        stage = graph.stages[sid]
        chain, region = [outer.index], outer
        while (child := region.split[region.stages.index(sid)]) >= 0:
            region = placed[child]
            chain.append(child)
        ops = graph.ops[stage.first : stage.last]
        moves = any(op.random for op in ops)
        if position:
            before = graph.stages[outer.stages[position - 1]]
            if any(op.random for op in graph.ops[before.last : stage.first]):
                fresh = False
        links = {
            n: (outer.stages.index(i.source[0]), i.source[1])
            for n, i in enumerate(stage.inputs)
            if i.source is not None and i.source[0] in outer.stages
        }
        inside = [s for i, s in enumerate(graph.stages) if sid in graph.ancestors(i)]
        stages[stage.key] = StageProgram(
            key=stage.key,
            chain=tuple(chain),
            links=links,
            random=moves and not fresh,
            moves_random=moves,
            generators=tuple({g: None for s in inside for g in s.generators}),
            buffers=_buffers(graph, sid),
            touches=tuple({t: None for s in inside for t in s.touches}),
            inner=tuple({s.path: None for s in inside if s.key in patched and s.key != stage.key}),
        )
        fresh = fresh or moves


def _buffers(graph: Graph, sid: int) -> tuple[tuple[str, str, bool], ...]:
    """Buffers that a stage changes, and whether what it computes depends on their old value."""
    stage = graph.stages[sid]
    ops = graph.ops[stage.first : stage.last]
    found = []
    for storage_id in {w: None for op in ops for w in op.writes}:
        storage = graph.storages[storage_id]
        if storage.category is not Category.BUFFER:
            continue
        read = any(
            storage_id in (graph.values[v].storage for v in op.inputs)
            for op in ops
            if storage_id not in op.writes and not op.view
        )
        feeds_back = any(
            storage_id in op.writes and op.outputs and "batch_norm" not in op.name
            and any(graph.values[v].storage != storage_id for v in op.outputs)
            for op in ops
        )  # fmt: skip
        # ``item`` reads a single number without an operation
        single = storage.bytes <= _SCALAR_BYTES
        path, _, name = storage.name.rpartition(".")
        found.append((path, name, read or feeds_back or single))
    return tuple(found)
