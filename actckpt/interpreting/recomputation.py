"""Recomputation by operations: what can run again, from what, and where a run can get hold of it.

An operation is run again on exactly the tensors that it had: parameters, the batch, constants, what
other operations of the burst make, and *pinned* activations. A tensor can be pinned where the
forward shows it: as an argument or a result of a torch function (`Graph.calls`), or saved by
autograd.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass
from functools import cached_property

from actckpt.data.graph import STATISTICS, TRANSFORMS, Category, Graph, Op

RESIDENT = (Category.PARAMETER, Category.BUFFER, Category.BATCH, Category.CONSTANT)
# modules whose operations may be others when torch functions are followed (fused inference paths)
_FUSED = ("MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer")


def moved_statistics(op: Op) -> tuple[int, ...]:
    """Positions of the running statistics that an operation moves, and made again leaves alone.

    Empty for any other operation; so it is for normalization with frozen statistics, which reads
    them.
    """
    return STATISTICS.get(op.name, ()) if op.writes else ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a run sees a storage: in call ``call`` as argument or result ``leaf``, or as a save.

    ``value`` is the window through which it is seen there.
    """

    call: int
    leaf: int
    result: bool
    save: int
    value: int


class Recomputation:
    """What a graph allows to recompute by operations; what does not depend on the plan.

    Attributes:
        makers: activation -> operations that make or change it, ascending.
        saves: activation -> indices of what autograd saves of it, for those that can be dropped.
        stays: activations that autograd saves and that cannot be dropped.
        refusal: why nothing can be ("" if something can).
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.root = graph.stages[0] if graph.stages else None
        self.refusal = self._refusal()
        self.makers: dict[int, list[int]] = {}
        self.written: set[int] = set()  # residents that the forward changes in place
        self._starts = [c.first for c in graph.calls]
        self._inputs: dict[int, frozenset[int]] = {}
        self._outputs: dict[int, frozenset[int]] = {}
        self._calls: dict[int, int] = {}
        first, last = self.span
        for index in range(first, last):
            op = graph.ops[index]
            if op.view:
                continue
            statistics = moved_statistics(op)
            for sid in {graph.values[v].storage for v in op.outputs}.union(op.writes):
                if sid >= 0 and graph.storages[sid].born >= first:
                    self.makers.setdefault(sid, []).append(index)
                elif sid >= 0 and not statistics:
                    self.written.add(sid)
        self.last_write = {sid: found[-1] for sid, found in self.makers.items()}
        self._blind = self._blind_arguments()
        self._mixed = self._mixed_storages()
        self.stays: set[int] = set()
        self.saves = self._droppable() if not self.refusal else {}

    def keeping(self, storages: Collection[int]) -> Recomputation:
        """The same where some activations stay as autograd saves them."""
        other = copy.copy(self)
        other.saves = {sid: saves for sid, saves in self.saves.items() if sid not in storages}
        other.stays = self.stays.union(sid for sid in storages if sid in self.saves)
        return other

    @property
    def span(self) -> tuple[int, int]:
        """The operations of the root's forward."""
        if self.root is None or self.refusal:
            return 0, 0
        return self.root.first, self.root.last

    def _refusal(self) -> str:
        if not self.graph.calls:
            return "the forward calls no torch function"
        if any(c.text.startswith('["torch.Tensor.data.__set__"') for c in self.graph.calls):
            return "the forward sets .data of a tensor"
        for op in self.graph.ops:
            if op.asked and self._counts(op):
                path = self.graph.stages[op.stage].path if op.stage >= 0 else ""
                return f"{path or 'the model'} asks for a number that every step changes"
        for s in self.graph.stages:
            if s.kind in _FUSED and s.last > s.first and self._is_evaluated(s.first, s.last):
                return f"{s.path} may run a fused kernel in evaluation"
        return ""

    def _counts(self, op: Op) -> bool:
        """Whether an operation moves a buffer, or makes from one what its module then holds."""
        assigns = op.stage >= 0 and bool(self.graph.stages[op.stage].touches)
        moved = {*op.writes, *(self.graph.values[v].storage for v in op.inputs if assigns)}
        return any(self.graph.storages[s].category is Category.BUFFER for s in moved if s >= 0)

    def _is_evaluated(self, first: int, last: int) -> bool:
        """Whether nothing of a span is saved: nobody trains it."""
        return not any(first < save.at <= last for save in self.graph.saves)

    # ---- operations

    def call_of(self, op: int) -> int:
        """The function call that ran an operation, or -1."""
        known = self._calls.get(op)
        if known is None:
            known = self._calls[op] = self._find_call(op)
        return known

    def _find_call(self, op: int) -> int:
        found = bisect_right(self._starts, op) - 1
        while found >= 0 and self.graph.calls[found].last <= op:
            found -= 1  # calls that ran nothing begin where others do
        return found if found >= 0 and self.graph.calls[found].first <= op else -1

    @cached_property
    def _refused(self) -> list[tuple[int, int]]:
        return [
            (s.first, s.last)
            for s in self.graph.stages
            if "draws from a generator" in s.refusal
            or s.refusal.startswith("contains a ScriptModule")
        ]

    @cached_property
    def _replayable(self) -> dict[int, bool]:
        return {}

    def can_run(self, index: int) -> bool:
        """Whether an operation gives the same again, given the same inputs."""
        found = self._replayable.get(index)
        if found is None:
            found = self._replayable[index] = self._can_run(index)
        return found

    def _can_run(self, index: int) -> bool:
        graph, op = self.graph, self.graph.ops[index]
        if op.nested or '{"other":' in graph.signatures[op.signature] or not op.outputs:
            return False
        if any(first <= index < last for first, last in self._refused):
            return False
        for v in (*op.inputs, *op.outputs):
            sid = graph.values[v].storage
            if sid < 0 or sid in self._mixed:
                return False
        if not moved_statistics(op) and any(w not in self.makers for w in op.writes):
            return False
        call = self.call_of(index)
        if call in self._blind or (op.random and call < 0):
            return False
        return all(
            self.source(sid) is not None and sid not in self.written
            for sid in self.inputs(index)
            if graph.storages[sid].category in RESIDENT
        )

    def inputs(self, index: int) -> frozenset[int]:
        """Storages that running an operation again reads."""
        found = self._inputs.get(index)
        if found is None:
            found = self._inputs[index] = self._read(index)
        return found

    def outputs(self, index: int) -> frozenset[int]:
        """Storages that an operation makes or changes."""
        found = self._outputs.get(index)
        if found is None:
            op = self.graph.ops[index]
            made = {self.graph.values[v].storage for v in op.outputs}
            found = self._outputs[index] = frozenset(made.union(op.writes))
        return found

    def _read(self, index: int) -> frozenset[int]:
        graph, op = self.graph, self.graph.ops[index]
        found = {graph.values[v].storage for v in op.inputs}
        if moved_statistics(op):
            found.difference_update(
                s for s in tuple(found) if s >= 0 and graph.storages[s].category is Category.BUFFER
            )
        return frozenset(found)

    def earlier_draws(self, index: int) -> list[int]:
        """Random operations before this one in the same function call: they must be drawn again."""
        call = self.graph.calls[self.call_of(index)]
        return [i for i in range(call.first, index) if self.graph.ops[i].random]

    def _blind_arguments(self) -> dict[int, frozenset[int]]:
        """Calls that are given tensors of unknown origin, and the storages of those.

        Following cannot tell such a tensor from another, be it another view of a parameter: neither
        the call's operations run again nor does it show what it is given.
        """
        found = {}
        for number, call in enumerate(self.graph.calls):
            unknown = (v for v, w in zip(call.inputs, call.sources, strict=True) if w < 0 <= v)
            sids = frozenset(self.graph.values[v].storage for v in unknown)
            if sids:
                found[number] = sids
        return found

    @cached_property
    def _hookable(self) -> set[int] | None:
        """Saves that hooks can be put round; None for all, round the forward as a whole."""
        if not any(TRANSFORMS in s.refusal for s in self.graph.stages):
            return None
        return {k for c in self.graph.calls for k in range(c.first_save, c.last_save)}

    def _may_hook(self, save: int) -> bool:
        """Whether a run can see what autograd saves there."""
        return self._hookable is None or save in self._hookable

    def _is_blind(self, save: int) -> bool:
        """Whether autograd saves there an argument of unknown origin."""
        sid = self.graph.values[self.graph.saves[save].value].storage
        return any(
            sid in sids
            and self.graph.calls[number].first_save <= save < self.graph.calls[number].last_save
            for number, sids in self._blind.items()
        )

    def _mixed_storages(self) -> set[int]:
        """Storages seen under more than one type, or by tensors that no window describes."""
        dtypes: dict[int, str] = {}
        mixed: set[int] = set()
        for v in self.graph.values:
            if v.storage < 0:
                continue
            if dtypes.setdefault(v.storage, v.dtype) != v.dtype or v.dtype.startswith("complex"):
                mixed.add(v.storage)
        return mixed

    # ---- storages

    def _droppable(self) -> dict[int, tuple[int, ...]]:
        graph = self.graph
        assert self.root is not None
        found: dict[int, list[int]] = {}
        kept: set[int] = set()
        for k, save in enumerate(graph.saves):
            sid = graph.values[save.value].storage
            if save.held or sid not in self.makers:
                continue
            inside = self.root.first_save <= k < self.root.last_save and self._may_hook(k)
            early = 0 <= save.first_use < graph.forward_end
            changes = save.at <= self.last_write[sid] or sid in self._mixed
            if not inside or early or changes or self._is_blind(k):
                kept.add(sid)
            found.setdefault(sid, []).append(k)
        droppable = {
            sid: tuple(saves)
            for sid, saves in found.items()
            if sid not in kept
            and any(graph.saves[k].first_use >= 0 for k in saves)
            and all(self.can_run(m) for m in self.makers[sid])
        }
        self.stays = found.keys() - droppable.keys()
        return droppable

    @cached_property
    def _sources(self) -> dict[int, Source]:
        """The first place after its last change where each storage is seen."""
        graph = self.graph
        found: dict[int, tuple[int, Source]] = {}

        def enter(at: int, source: Source) -> None:
            sid = graph.values[source.value].storage if source.value >= 0 else -1
            if sid < 0 or self.last_write.get(sid, -1) >= at:
                return
            if sid not in found or found[sid][0] > at:
                found[sid] = (at, source)

        for number, call in enumerate(graph.calls):
            for leaf, value in enumerate(call.inputs):
                if call.sources[leaf] >= 0 or number not in self._blind:
                    enter(call.first, Source(number, leaf, False, -1, value))
            for leaf, value in enumerate(call.outputs):
                enter(call.last, Source(number, leaf, True, -1, value))
        if self.root is not None:
            for k in range(self.root.first_save, self.root.last_save):
                save = graph.saves[k]
                if self._is_blind(k) or not self._may_hook(k):
                    continue
                enter(save.at, Source(self.call_of(save.at - 1), 0, False, k, save.value))
        return {sid: source for sid, (_, source) in found.items()}

    @cached_property
    def _returned(self) -> set[int]:
        """What the user gets to see, and may change: pinned only where autograd saves it, too."""
        if self.root is None:
            return set()
        saved = {self.graph.values[s.value].storage for s in self.graph.saves}
        return {self.graph.values[v].storage for v in self.root.outputs} - saved

    def source(self, sid: int) -> Source | None:
        """Where a run can get hold of a storage, or None."""
        return None if sid in self._returned else self._sources.get(sid)

    def can_pin(self, sid: int, reader: int) -> bool:
        """Whether an operation that runs again can read an activation that was pinned."""
        source = self.source(sid)
        if source is None or sid in self._mixed or reader <= self.last_write.get(sid, -1):
            return False
        return source.call <= self.call_of(reader)

    # ---- closures

    def reachable(self, needed: Iterable[int], first: int) -> tuple[list[int], list[int]]:
        """(activations, operations) from ``first`` on that making some of them again may take."""
        todo = list(needed)
        storages, ops = set(todo), set[int]()
        while todo:
            for index in self.makers[todo.pop()]:
                if index in ops:
                    continue
                ops.add(index)
                for sid in self.inputs(index).union(self.graph.ops[index].writes):
                    inside = sid in self.makers and self.graph.storages[sid].born >= first
                    if inside and sid not in storages:
                        storages.add(sid)
                        todo.append(sid)
        return sorted(storages), sorted(ops)

    def _made_aside(self, pins: set[int], ops: set[int]) -> list[int]:
        """What would be pinned, and is made again by an operation that runs for something else."""
        return [s for s in pins if self.makers[s][0] in ops]

    def closure(
        self,
        drops: Iterable[int],
        may_pin: Callable[[int], bool],
        handed: Container[int] = frozenset(),
    ) -> tuple[tuple[int, ...], frozenset[int]] | None:
        """(operations that make the dropped storages again, activations that they read), or None.

        Args:
            may_pin: whether an activation may be read as the forward left it; where not, or where
                that cannot be, it is made again, too.
            handed: activations that an enclosing burst hands over.
        """
        ops: set[int] = set()
        made: set[int] = set()
        pins: set[int] = set()
        end = len(self.graph.ops)
        todo = [(sid, end) for sid in drops]
        while todo or (again := self._made_aside(pins, ops)):
            if not todo:
                # another result of an operation that runs: it must end as the forward left it
                todo = [(sid, end) for sid in again]
            sid, before = todo.pop()
            made.add(sid)
            if sid in pins:
                pins.discard(sid)
                todo.append((sid, end))
            for maker in self.makers.get(sid, ()):
                if maker >= before or maker in ops:
                    continue
                fresh = [maker]
                if self.graph.ops[maker].random:
                    fresh += self.earlier_draws(maker)
                for index in fresh:
                    if index in ops:
                        continue
                    if not self.can_run(index):
                        return None
                    ops.add(index)
                    for read in self.inputs(index):
                        if self.graph.storages[read].category in RESIDENT:
                            continue
                        if read not in self.makers:
                            return None
                        if read in made:
                            todo.append((read, index))
                        elif (read in handed and index > self.last_write[read]) or (
                            may_pin(read) and self.can_pin(read, index)
                        ):
                            pins.add(read)
                        else:
                            todo.append((read, index))
                    todo.extend(
                        (w, index) for w in self.graph.ops[index].writes if w in self.makers
                    )
        return tuple(sorted(ops)), frozenset(pins)
