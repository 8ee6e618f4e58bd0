"""Which calls of a forward need to be followed: the stretches that bursts depend on.

A torch function mode sees every call of torch's Python interface, and comparing one costs
microseconds. What lies between two calls that bursts depend on is let pass; where a module's
forward begins or ends in between, the mode is taken away until then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actckpt.data.graph import Graph
from actckpt.interpreting.bursts import PlacedBurst
from actckpt.interpreting.recomputation import Recomputation, Source
from actckpt.interpreting.windows import Windows

# fewer calls than these are followed rather than left out: a boundary costs about as much as one
_LEAST = 3


@dataclass(frozen=True, slots=True)
class Boundary:
    """The forward of ``stage`` begins, or ends; ``at`` calls have been made by then."""

    stage: int
    end: bool
    at: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Calls ``[first, last)`` of a stretch on which nothing depends: seen, but not compared.

    ``carried`` are wires that calls before them make, calls after them are given, and bursts make
    again: what is let pass must not change them.
    """

    first: int
    last: int
    carried: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Calls ``[first, last)``, all of which are seen.

    Attributes:
        begins: where following is taken up; None: with the forward.
        rests: where calls need not even be seen until the next stretch; None: nowhere.
        passes: those of its calls that are not compared.
        carried: as of a `Pass`, for what lies between this stretch and the next.
    """

    first: int
    last: int
    begins: Boundary | None
    rests: Boundary | None
    passes: tuple[Pass, ...]
    carried: tuple[int, ...]


class Stretches:
    """What a graph's calls and module boundaries allow to leave out."""

    def __init__(self, possible: Recomputation) -> None:
        self.possible = possible
        self.graph: Graph = possible.graph
        self.windows = Windows(self.graph, frozenset(possible.makers))

    def sources(self, placed: Iterable[PlacedBurst]) -> dict[int, Source]:
        """Where a run gets hold of what bursts read as the forward left it."""
        return self._depended(placed)[1]

    def needed(self, placed: Iterable[PlacedBurst]) -> np.ndarray:
        """The calls that bursts depend on, ascending.

        Those whose operations run again, that show what is pinned, during which autograd saves what
        is dropped, and that return or change a storage which bursts make or read, unless they only
        look at it.
        """
        found = self._depended(placed)[0]
        if -1 in found:  # a custom Function saves or makes it, outside of any call
            return np.arange(len(self.graph.calls))
        return np.array(sorted(found), dtype=np.int64)

    def _depended(self, placed: Iterable[PlacedBurst]) -> tuple[set[int], dict[int, Source]]:
        possible = self.possible
        calls: set[int] = set()
        readers: dict[int, set[int]] = {}
        for p in placed:
            for op in p.burst.ops:
                call = possible.call_of(op)
                calls.add(call)
                for sid in possible.inputs(op):
                    if sid in p.pins or sid in p.residents:
                        readers.setdefault(sid, set()).add(call)
            for sid in p.residents:
                readers.setdefault(sid, set())
            calls.update(self._saving.get(k, -1) for k in p.burst.drops)
            for sid in p.made:
                calls.update(self._touching.get(sid, ()))
        sources: dict[int, Source] = {}
        alone = frozenset(calls)
        for sid, read_by in readers.items():
            source = possible.source(sid)
            assert source is not None
            shown = source.call if source.save < 0 else self._saving.get(source.save, -1)
            at_reader = self._at_first(sid, read_by) if shown not in alone else None
            sources[sid] = at_reader or source
            if at_reader is None:
                calls.add(shown)
                if sid in possible.makers:
                    calls.update(self._touching.get(sid, ()))
        return calls, sources

    def _at_first(self, sid: int, readers: set[int]) -> Source | None:
        """The first reader's own argument, where each is given windows of the same tensor."""
        calls = self.graph.calls
        if not readers or -1 in readers:
            return None
        given = [
            (c, leaf, value, self.windows.origin(wire))
            for c in sorted(readers)
            for leaf, (value, wire) in enumerate(
                zip(calls[c].inputs, calls[c].sources, strict=True)
            )
            if self._storage(value) == sid
        ]
        origins = {(origin, value if origin < 0 else -1) for _, _, value, origin in given}
        first = min(readers)
        if len(origins) != 1 or self.possible.last_write.get(sid, -1) >= calls[first].first:
            return None
        if {c for c, *_ in given} != readers:
            return None
        _, leaf, value, _ = given[0]
        return Source(first, leaf, False, -1, value)

    def count(self, needed: np.ndarray) -> tuple[int, int, int]:
        """How many calls are compared, how many others are seen, and in how many stretches."""
        begins, apart = self._begins(needed)
        return len(needed), int((needed - begins).sum()), 1 + int(apart[1:].sum())

    def stretches(self, needed: np.ndarray, placed: Sequence[PlacedBurst]) -> tuple[Stretch, ...]:
        """The calls to follow, () for all of them."""
        if not 0 < len(needed) < len(self.graph.calls):
            return ()
        begins, apart = self._begins(needed)
        runs = self._runs(needed)
        carried = self._carried(runs, placed)
        heads = [n for n in range(len(needed)) if apart[n] or not n]
        found = []
        for head, tail in itertools.pairwise([*heads, len(needed)]):
            first, last = int(begins[head]), int(needed[tail - 1]) + 1
            after = int(begins[tail]) if tail < len(needed) else len(self.graph.calls)
            passes = []
            reached, wires = first, tuple[int, ...]()
            for (start, stop), behind in zip(runs, carried, strict=True):
                if first <= start < last:
                    if start > reached:
                        passes.append(Pass(reached, start, wires))
                    reached, wires = stop, behind
            begin = self._last_before(first)
            rest = self._rest(last, after)
            found.append(Stretch(first, last, begin, rest, tuple(passes), wires))
        return tuple(found)

    def _runs(self, needed: np.ndarray) -> list[tuple[int, int]]:
        """Needed calls that come one after the other, as ``[first, last)``."""
        breaks = np.flatnonzero(np.diff(needed) > 1) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(needed, breaks)]

    def _begins(self, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each needed call, from which on it and what is let pass are seen; if after a rest."""
        after = np.concatenate(([0], needed[:-1] + 1)) if len(needed) else needed
        boundary = self.starts[np.searchsorted(self.starts, needed, side="right") - 1]
        apart = boundary - after >= _LEAST
        return np.where(apart, boundary, after), apart

    # ---- boundaries

    @cached_property
    def _boundaries(self) -> list[Boundary]:
        """In the order in which a forward passes them."""
        return list(self._walk(0)) if self.graph.stages else []

    def _walk(self, stage: int) -> Iterator[Boundary]:
        found = self.graph.stages[stage]
        inner = stage > 0 and found.first_call >= 0
        if inner:
            yield Boundary(stage, False, found.first_call)
        for child in self.graph.children[stage]:
            yield from self._walk(child)
        if inner and found.last_call >= 0:
            yield Boundary(stage, True, found.last_call)

    @cached_property
    def starts(self) -> np.ndarray:
        """Calls made at each boundary, the beginning of the forward first, ascending."""
        return np.array([0, *(b.at for b in self._boundaries)], dtype=np.int64)

    def _last_before(self, call: int) -> Boundary | None:
        """The last boundary before a call; None: the beginning of the forward."""
        if not call:
            return None
        n = int(np.searchsorted(self.starts, call, side="right")) - 1
        return self._boundaries[n - 1] if n and self.starts[n] == call else None

    def _rest(self, last: int, following: int) -> Boundary | None:
        """The first boundary after a stretch, where enough calls come before the next."""
        n = int(np.searchsorted(self.starts, last, side="left"))
        if n == 0 or n == len(self.starts) or following - self.starts[n] < _LEAST:
            return None
        return self._boundaries[n - 1]

    # ---- what is touched

    @cached_property
    def _saving(self) -> dict[int, int]:
        """Call during which autograd saves each tensor."""
        return {
            k: number
            for number, c in enumerate(self.graph.calls)
            for k in range(c.first_save, c.last_save)
        }

    @cached_property
    def _touching(self) -> dict[int, list[int]]:
        """Calls that return or change each storage, but for those that only look at it."""
        graph = self.graph
        found: dict[int, list[int]] = {}
        for number, call in enumerate(graph.calls):
            if number in self.windows.calls:
                continue
            sids = {graph.values[v].storage for v in call.outputs if v >= 0}
            sids.update(w for op in graph.ops[call.first : call.last] for w in op.writes)
            for sid in sids:
                found.setdefault(sid, []).append(number)
        return found

    def _carried(
        self, runs: list[tuple[int, int]], placed: Sequence[PlacedBurst]
    ) -> list[tuple[int, ...]]:
        """Wires of what bursts make again that outlive each run."""
        graph = self.graph
        made = {sid for p in placed for sid in p.made}
        read_last: dict[int, int] = {}
        for n, (first, last) in enumerate(runs):
            for call in graph.calls[first:last]:
                read_last.update(dict.fromkeys(map(self.windows.origin, call.sources), n))
                read_last.update(dict.fromkeys(call.sources, n))
        found: list[tuple[int, ...]] = []
        alive: list[int] = []
        for n, (first, last) in enumerate(runs):
            for call in graph.calls[first:last]:
                alive += [
                    call.wire + leaf
                    for leaf, v in enumerate(call.outputs)
                    if self._storage(v) in made
                ]
            alive = [wire for wire in alive if read_last.get(wire, -1) > n]
            found.append(tuple(alive))
        return found

    def _storage(self, value: int) -> int:
        return self.graph.values[value].storage if value >= 0 else -1
