"""Bursts compiled for one model: which calls to follow, which saves to drop, what to run again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

import torch

from actckpt.data.graph import FunctionCall, Graph
from actckpt.data.plan import Plan
from actckpt.interpreting.bursts import PlacedBurst, place_bursts
from actckpt.interpreting.recomputation import Recomputation, moved_statistics
from actckpt.interpreting.stretches import Stretch, Stretches
from actckpt.rewriting.wires import ViewOf, Window, Wires, loose, nothing

# what is done where a module's forward begins or ends, beside the number of a stretch to take up
RESTS = -1


@dataclass(frozen=True, slots=True)
class Capture:
    """A tensor that a call shows and bursts read: its argument or result number ``leaf``."""

    leaf: int
    result: bool
    storage: int
    value: int


@dataclass(frozen=True, slots=True)
class CallSaves:
    """Numbers [first, last) of the tensors that autograd saves in a call.

    ``wanted`` is the last one that is dropped or pinned.
    """

    first: int
    last: int
    wanted: int


@dataclass(frozen=True, slots=True)
class CallProgram:
    """One call to follow; ``draws``: the random state before it is needed again.

    ``first`` is its first operation: a run that leaves the trace here has done those before.
    ``saves`` is what autograd saves meanwhile, None where all of it stays as autograd has it.
    ``roots`` are results of which others are given windows that no compared call returns: the wire
    of each, and the place among the wires of what it is a view of.
    """

    text: str
    sources: tuple[int, ...]
    wire: int
    results: int
    first: int
    draws: bool
    captures: tuple[Capture, ...]
    saves: CallSaves | None
    roots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PassedCall:
    """A call that is seen, but not compared: the ``first`` or ``last`` of several in a row.

    ``carried`` are wires that they must not change.
    """

    first: bool
    last: bool
    carried: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveProgram:
    """One tensor that autograd saves: dropped (``burst`` >= 0), pinned (``storage`` >= 0) or both.

    ``at`` is how many operations have run by then.
    """

    burst: int
    storage: int
    value: int
    at: int


@dataclass(frozen=True, slots=True)
class StepProgram:
    """One operation of a burst.

    Attributes:
        inputs: value of each tensor argument, in order.
        outputs: value of each result.
        draws: call whose random state it begins with, or -1.
        done: storages that nothing reads after it.
        blank: positions of arguments to leave out (running statistics).
    """

    op: int
    signature: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    draws: int
    done: tuple[int, ...]
    blank: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BurstProgram:
    """One burst; ``taken`` are (storage, burst that gives it), ``hands`` what this one gives.

    ``draws``: calls whose random states its steps begin with, one for each of those steps.
    """

    label: str
    parent: int
    steps: tuple[StepProgram, ...]
    pins: tuple[int, ...]
    taken: tuple[tuple[int, int], ...]
    hands: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that a run under bursts looks up. ``windows`` are the values that it deals in.

    ``outside``: a save that is dropped or pinned belongs to no call, but to a custom Function.
    ``stretches`` are the calls to follow, () for all of them; ``turns`` what is done where the
    forward of a (module path, call number) begins and where it ends: the stretch to take up,
    `RESTS`, or None. ``passed`` are calls of the stretches that are not compared, ``wires`` what is
    known of all wires before a run that compares the others, ``asked`` those that compared ones
    read and no call makes.

    How often things are asked for in one backward, after which nobody asks any more: ``readers`` by
    pinned storage, ``drawers`` by call whose random state is kept, ``takers`` by (burst, storage
    that it hands on).
    """

    calls: tuple[CallProgram, ...]
    saves: tuple[SaveProgram | None, ...]
    outside: bool
    bursts: tuple[BurstProgram, ...]
    windows: dict[int, Window]
    stretches: tuple[Stretch, ...] = ()
    turns: dict[tuple[str, int], tuple[int | None, int | None]] = field(default_factory=dict)
    passed: dict[int, PassedCall] = field(default_factory=dict)
    wires: Wires = field(default_factory=list)
    asked: frozenset[int] = frozenset()
    readers: dict[int, int] = field(default_factory=dict)
    drawers: dict[int, int] = field(default_factory=dict)
    takers: dict[tuple[int, int], int] = field(default_factory=dict)


def compile_bursts(graph: Graph, plan: Plan) -> Schedule | None:
    """The schedule of a plan by operations; None if it has no bursts.

    Raises:
        PlanError: the plan does not fit the graph.
    """
    if not plan.bursts:
        return None
    possible = Recomputation(graph)
    return _Compiler(possible, place_bursts(possible, plan)).compile()


class _Compiler:
    def __init__(self, possible: Recomputation, placed: tuple[PlacedBurst, ...]) -> None:
        self.possible = possible
        self.graph = possible.graph
        self.placed = placed
        self.values: set[int] = set()

    def compile(self) -> Schedule:
        graph = self.graph
        assert self.possible.root is not None
        bursts = tuple(self._burst(p) for p in self.placed)
        following = Stretches(self.possible)
        captures: dict[int, list[Capture]] = {}
        saved: dict[int, int] = {}
        for sid, source in sorted(following.sources(self.placed).items()):
            self.values.add(source.value)
            if source.save >= 0:
                saved[source.save] = sid
            else:
                capture = Capture(source.leaf, source.result, sid, source.value)
                captures.setdefault(source.call, []).append(capture)
        drawn = {step.draws for b in bursts for step in b.steps}
        dropped = {k: p.index for p in self.placed for k in p.burst.drops}
        wanted = dropped.keys() | saved.keys()
        root = self.possible.root
        needed = following.needed(self.placed)
        compared = set(needed.tolist())
        wires, roots = self._wires(following, compared)
        calls = tuple(
            CallProgram(
                c.text, c.sources, c.wire, len(c.outputs), c.first, n in drawn,
                tuple(captures.get(n, ())), self._saves(c, wanted),
                tuple((w, roots[w]) for w in range(c.wire, c.wire + len(c.outputs)) if w in roots),
            )
            for n, c in enumerate(graph.calls)
        )  # fmt: skip
        saves: list[SaveProgram | None] = []
        for k in range(root.first_save, root.last_save):
            save = graph.saves[k]
            if k in wanted:
                self.values.add(save.value)
                program = SaveProgram(dropped.get(k, -1), saved.get(k, -1), save.value, save.at)
            saves.append(program if k in wanted else None)
        inside = {k for c in graph.calls for k in range(c.first_save, c.last_save)}
        windows = {v: self._window(v) for v in sorted(self.values)}
        outside = not wanted <= inside
        stretches = () if outside else following.stretches(needed, self.placed)
        asked = frozenset(
            wire for n in compared for wire in calls[n].sources if 0 <= wire < calls[0].wire
        )
        stretches = tuple(self._rooted(stretch, roots) for stretch in stretches)
        passed = {
            n: PassedCall(n == p.first, n == p.last - 1, p.carried)
            for stretch in stretches
            for p in stretch.passes
            for n in range(p.first, p.last)
        }
        turns = self._turns(stretches)
        return Schedule(
            calls, tuple(saves), outside, bursts, windows, stretches, turns, passed, wires, asked,
            readers=dict(Counter(sid for b in bursts for sid in b.pins)),
            drawers=dict(Counter(call for b in bursts for call in b.draws)),
            takers=dict(Counter((giver, sid) for b in bursts for sid, giver in b.taken)),
        )  # fmt: skip

    def _window(self, value: int) -> Window:
        v = self.graph.values[value]
        return v.storage, v.shape, v.stride, v.offset, getattr(torch, v.dtype)

    def _wires(self, following: Stretches, compared: Set[int]) -> tuple[Wires, dict[int, int]]:
        """What is known of every wire before a run that compares some calls; where roots are.

        Of what other calls return, whatever is given first is taken, but for windows of what bursts
        deal in.
        """
        graph = self.graph
        last = graph.calls[-1]
        wires: Wires = [nothing] * (last.wire + len(last.outputs))
        others: set[int] = set()
        for n, c in enumerate(graph.calls):
            if n not in compared:
                others.update(range(c.wire, c.wire + len(c.outputs)))
        for wire in others:
            wires[wire] = loose
        dealt = {sid for p in self.placed for sid in p.made | p.pins}
        roots: dict[int, int] = {}
        for n in sorted(compared):
            for wire, value in zip(graph.calls[n].sources, graph.calls[n].inputs, strict=True):
                if wire in others and value >= 0 and graph.values[value].storage in dealt:
                    origin = following.windows.origin(wire)
                    if origin not in roots:
                        roots[origin] = len(wires)
                        wires.append(nothing)
                    wires[wire] = ViewOf(roots[origin], self._window(value))
        return wires, roots

    def _rooted(self, stretch: Stretch, roots: dict[int, int]) -> Stretch:
        """A stretch that carries roots where those may outlive the results that view them."""
        passes = tuple(
            dataclasses.replace(p, carried=tuple(roots.get(w, w) for w in p.carried))
            for p in stretch.passes
        )
        carried = tuple(roots.get(w, w) for w in stretch.carried)
        return dataclasses.replace(stretch, passes=passes, carried=carried)

    def _turns(
        self, stretches: tuple[Stretch, ...]
    ) -> dict[tuple[str, int], tuple[int | None, int | None]]:
        found: dict[tuple[str, int], list[int | None]] = {}
        for n, stretch in enumerate(stretches):
            for boundary, does in ((stretch.begins, n), (stretch.rests, RESTS)):
                if boundary is not None:
                    key = self.graph.stages[boundary.stage].key
                    found.setdefault(key, [None, None])[boundary.end] = does
        return {key: (begin, end) for key, (begin, end) in found.items()}

    def _saves(self, call: FunctionCall, wanted: Set[int]) -> CallSaves | None:
        assert self.possible.root is not None
        begin = self.possible.root.first_save
        found = wanted & set(range(call.first_save, call.last_save))
        if not found:
            return None
        return CallSaves(call.first_save - begin, call.last_save - begin, max(found) - begin)

    def _burst(self, p: PlacedBurst) -> BurstProgram:
        graph, possible = self.graph, self.possible
        given = {s for child in self.placed for s, giver in child.taken.items() if giver == p.index}
        kept = given | {graph.values[graph.saves[k].value].storage for k in p.burst.drops}
        last: dict[int, int] = {}
        for n, op in enumerate(p.burst.ops):
            made = {graph.values[v].storage for v in graph.ops[op].outputs}
            last.update(dict.fromkeys(possible.inputs(op) | made, n))
        done: dict[int, list[int]] = {}
        for sid, n in last.items():
            if sid not in kept:
                done.setdefault(n, []).append(sid)
        steps = tuple(self._step(op, tuple(done.get(n, ()))) for n, op in enumerate(p.burst.ops))
        stages = [graph.stages[graph.ops[i].stage].path for i in p.burst.ops]
        ends = dict.fromkeys(path or "the model" for path in (stages[0], stages[-1]))
        return BurstProgram(
            label=" … ".join(ends),
            parent=p.parent,
            steps=steps,
            pins=tuple(sorted((*p.pins, *p.residents))),
            taken=tuple(sorted(p.taken.items())),
            hands=tuple(sorted(given)),
            draws=tuple(s.draws for s in steps if s.draws >= 0),
        )

    def _step(self, index: int, done: tuple[int, ...]) -> StepProgram:
        graph, op = self.graph, self.graph.ops[index]
        self.values.update((*op.inputs, *op.outputs))
        draws = -1
        if op.random and not self.possible.earlier_draws(index):
            draws = self.possible.call_of(index)
        return StepProgram(
            index,
            graph.signatures[op.signature],
            op.inputs,
            op.outputs,
            draws,
            done,
            moved_statistics(op),
        )
