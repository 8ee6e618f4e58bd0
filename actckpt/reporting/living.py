"""What lives at an instant of a step: the largest along the timeline, all of it at the peak."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from heapq import nlargest

from actckpt.data.graph import Category, Graph, Op
from actckpt.data.profile import Profile
from actckpt.interpreting.recomputation import Recomputation
from actckpt.planning.dry_run import DryRun
from actckpt.profiler.lives import Life
from actckpt.reporting.facts import PeakRow
from actckpt.reporting.table import short_op
from actckpt.reporting.timeline import Living

MOST = 6
WORKSPACE = "workspace"


def untouched_lives(graph: Graph) -> list[Life]:
    """The lives of the storages of the step as it was traced."""
    ends = [s.died for s in graph.storages]
    for save in graph.saves:
        sid = graph.values[save.value].storage
        if sid >= 0:
            ends[sid] = max(ends[sid], save.released)
    return [
        Life(
            born=max(s.born, 0),
            died=max(end, s.born, 0),
            bytes=s.bytes,
            category=s.category,
            since=max(s.born, 0),
            op=s.born,
            name=graph.ops[s.born].name if s.born >= 0 else "",
        )
        for s, end in zip(graph.storages, ends, strict=True)
    ]


def largest_living(
    graph: Graph, lives: Sequence[Life], instants: Sequence[int]
) -> tuple[tuple[Living, ...], ...]:
    """At each instant the six largest groups of activations of one operation in alike modules.

    O(lives + instants x groups).
    """
    changes: dict[int, list[tuple[tuple[str, str], int, int]]] = defaultdict(list)
    for life in lives:
        # what has become a gradient is none of the activations from then on
        end = life.died if life.category is Category.ACTIVATION else life.since
        if life.bytes and life.name and end != life.born:
            group = (short_op(life.name), where(graph, life))
            changes[life.born].append((group, 1, life.bytes))
            changes[end].append((group, -1, -life.bytes))
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    due = sorted(at for at in changes if at >= 0)  # those that never die go at -1
    found, done = [], 0
    for instant in instants:
        while done < len(due) and due[done] <= instant:
            for group, count, size in changes[due[done]]:
                counts[group] += count
                sizes[group] += size
                if not counts[group]:
                    del counts[group], sizes[group]
            done += 1
        largest = nlargest(MOST, sizes.items(), key=lambda item: item[1])
        found.append(tuple(Living(*group, counts[group], size) for group, size in largest))
    return tuple(found)


def at_peak(graph: Graph, profile: Profile, dry: DryRun, scope: str) -> tuple[PeakRow, ...]:
    """What the planned step's peak is made of: its bytes add up to the peak that the scope bounds.

    The largest first.
    """
    levels = [
        sum(at.values())
        if scope == "step"
        else at.get(str(Category.ACTIVATION), 0) + at.get(WORKSPACE, 0)
        for at in dry.timeline
    ]
    if not levels:
        return ()
    peak = levels.index(max(levels))
    sort = _Sort(graph, profile, peak >= dry.starts.get("backward", len(levels)))
    rows: dict[tuple[str, str, str, bool], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    held: Counter[str] = Counter({WORKSPACE: dry.timeline[peak].get(WORKSPACE, 0)})
    of_op: Counter[int] = Counter()
    for life in dry.lives:
        number, of_op[life.op] = of_op[life.op], of_op[life.op] + 1
        if not life.is_at(peak):
            continue
        category = life.category_at(peak)
        if category is not Category.ACTIVATION:
            held[str(category)] += life.bytes
            continue
        state, again_s = sort(life, number)
        row = rows[(short_op(life.name), where(graph, life), state, again_s is not None)]
        row[0] += 1
        row[1] += life.bytes
        row[2] += again_s or 0.0
    found = [
        PeakRow(op, module, state, int(count), int(size), seconds if possible else None)
        for (op, module, state, possible), (count, size, seconds) in rows.items()
        if size
    ]
    shown = held if scope == "step" else {WORKSPACE: held[WORKSPACE]}
    found += [PeakRow("", "", name, 1, size, None) for name, size in shown.items() if size]
    return tuple(sorted(found, key=lambda row: (-row.bytes, row.op, row.where)))


def running(graph: Graph, course: Sequence[tuple[int, str, bool]]) -> tuple[str, ...]:
    """What runs at each instant of a course, such as ``mm in h.3.mlp, recomputed``."""
    return tuple(
        short_op(name)
        + (f" in {path}" if (path := _path(graph, op)) else "")
        + (", recomputed" if again else "")
        for op, name, again in course
    )


def where(graph: Graph, life: Life) -> str:
    """The module in which a storage was made, a star for each number in its path."""
    return re.sub(r"(?<![^.\s])\d+", "*", _path(graph, life.op) or life.region)


def _path(graph: Graph, index: int) -> str:
    if index < 0:
        return ""
    op: Op = graph.ops[index]
    if op.stage < 0 and op.owner >= 0:
        op = graph.ops[op.owner]  # a backward operation belongs where its forward one ran
    return graph.stages[op.stage].path if op.stage >= 0 else ""


class _Sort:
    """Says of each activation why it is there, and what making it again would take."""

    def __init__(self, graph: Graph, profile: Profile, in_backward: bool) -> None:
        self.graph = graph
        self.in_backward = in_backward
        self.possible = Recomputation(graph)
        self.seconds = [profile.costs[op.signature].time_s for op in graph.ops]
        self.saved = {graph.values[s.value].storage for s in graph.saves if not s.held}
        self.by_birth: dict[int, list[int]] = defaultdict(list)
        for sid, s in enumerate(graph.storages):
            self.by_birth[s.born].append(sid)

    def __call__(self, life: Life, number: int) -> tuple[str, float | None]:
        """(state, seconds or None) of the storage that its operation made as number ``number``."""
        if life.again:
            return "recomputed", None
        if not 0 <= life.op < self.graph.forward_end:
            return "in use", None
        made = self.by_birth[life.op]
        sid = made[number] if number < len(made) else -1
        if sid not in self.saved:
            return ("held" if self.in_backward else "in use"), None
        return "saved", self._again_s(sid, life.op)

    def _again_s(self, sid: int, op: int) -> float | None:
        """What the operations that make it take: the least that making it again adds to a step."""
        if sid in self.possible.saves:
            return sum(self.seconds[m] for m in self.possible.makers[sid])
        if not self.possible.refusal:
            return None
        # not by operations: in a call that may run again as a whole
        stages = (self.graph.stages[s] for s in self.graph.ancestors(self.graph.ops[op].stage))
        free = any(s.parent >= 0 and not s.refusal and not s.mutates for s in stages)
        return self.seconds[op] if free else None
