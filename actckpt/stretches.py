"""Which calls of a forward need to be followed: the stretches that bursts depend on.

A torch function mode sees every call of torch's Python interface and costs microseconds a call.
Between two calls that bursts depend on it can be taken away, where a module's forward begins or
ends in between: that is where it can be put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actckpt.bursts import PlacedBurst
from actckpt.graph import Graph
from actckpt.recomputation import Recomputation

# fewer calls than these are followed rather than left out: a boundary costs about as much as one
_LEAST = 3


@dataclass(frozen=True, slots=True)
class Boundary:
    """The forward of ``stage`` begins, or ends; ``at`` calls have been made by then."""

    stage: int
    end: bool
    at: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Calls ``[first, last)``, all of which are followed.

    Attributes:
        begins: where following is taken up; None: with the forward.
        rests: where calls need not even be looked at until the next stretch; None: nowhere.
        carried: wires that the stretches before the end of this one make, calls after it are
            given, and bursts make again: what lies between must not change them.
    """

    first: int
    last: int
    begins: Boundary | None
    rests: Boundary | None
    carried: tuple[int, ...] = ()


class Stretches:
    """What a graph's calls and module boundaries allow to leave out."""

    def __init__(self, possible: Recomputation) -> None:
        self.possible = possible
        self.graph: Graph = possible.graph

    def needed(self, placed: Iterable[PlacedBurst]) -> np.ndarray:
        """The calls that bursts depend on, ascending.

        Those whose operations run again, that show what is pinned, during which autograd saves what
        is dropped, and that return or change a storage which bursts make or read.
        """
        possible, graph = self.possible, self.graph
        found: set[int] = set()
        for p in placed:
            found.update(possible.call_of(op) for op in p.burst.ops)
            for sid in (*p.pins, *p.residents):
                source = possible.source(sid)
                assert source is not None
                found.add(source.call if source.save < 0 else self._saving.get(source.save, -1))
            found.update(self._saving.get(k, -1) for k in p.burst.drops)
            for sid in p.pins | p.made:
                found.update(self._touching.get(sid, ()))
        if -1 in found:  # a custom Function saves or makes it, outside of any call
            return np.arange(len(graph.calls))
        return np.array(sorted(found), dtype=np.int64)

    def count(self, needed: np.ndarray) -> int:
        """How many calls are followed."""
        begins, _ = self._begins(needed)
        return int((needed - begins + 1).sum())

    def stretches(self, needed: np.ndarray, placed: Sequence[PlacedBurst]) -> tuple[Stretch, ...]:
        """The calls to follow, () for all of them."""
        begins, apart = self._begins(needed)
        if not len(needed) or not apart.any():
            return ()
        heads = [n for n in range(len(needed)) if apart[n] or not n]
        spans = [
            (int(begins[head]), int(needed[tail - 1]) + 1)
            for head, tail in zip(heads, [*heads[1:], len(needed)], strict=True)
        ]
        carried = self._carried(spans, placed)
        nexts = [first for first, _ in spans[1:]] + [len(self.graph.calls)]
        return tuple(
            Stretch(first, last, self._last_before(first), self._rest(last, following), wires)
            for (first, last), following, wires in zip(spans, nexts, carried, strict=True)
        )

    def _begins(self, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each needed call, where following it begins, and whether after a rest."""
        after = np.concatenate(([0], needed[:-1] + 1)) if len(needed) else needed
        boundary = self._positions[np.searchsorted(self._positions, needed, side="right") - 1]
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
    def _positions(self) -> np.ndarray:
        """Calls made at each boundary, the beginning of the forward first, ascending."""
        return np.array([0, *(b.at for b in self._boundaries)], dtype=np.int64)

    def _last_before(self, call: int) -> Boundary | None:
        """The last boundary before a call; None: the beginning of the forward."""
        if not call:
            return None
        n = int(np.searchsorted(self._positions, call, side="right")) - 1
        return self._boundaries[n - 1] if n and self._positions[n] == call else None

    def _rest(self, last: int, following: int) -> Boundary | None:
        """The first boundary after a stretch, where enough calls come before the next."""
        n = int(np.searchsorted(self._positions, last, side="left"))
        if n == 0 or n == len(self._positions) or following - self._positions[n] < _LEAST:
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
        """Calls that return or change each storage."""
        graph = self.graph
        found: dict[int, list[int]] = {}
        for number, call in enumerate(graph.calls):
            sids = {graph.values[v].storage for v in call.outputs if v >= 0}
            sids.update(w for op in graph.ops[call.first : call.last] for w in op.writes)
            for sid in sids:
                found.setdefault(sid, []).append(number)
        return found

    def _carried(
        self, spans: list[tuple[int, int]], placed: Sequence[PlacedBurst]
    ) -> list[tuple[int, ...]]:
        graph = self.graph
        made = {sid for p in placed for sid in p.made}
        read_last: dict[int, int] = {}
        for n, (first, last) in enumerate(spans):
            for call in graph.calls[first:last]:
                read_last.update(dict.fromkeys(call.sources, n))
        found: list[tuple[int, ...]] = []
        alive: list[int] = []
        for n, (first, last) in enumerate(spans):
            for call in graph.calls[first:last]:
                alive += [
                    call.wire + leaf
                    for leaf, v in enumerate(call.outputs)
                    if v >= 0 and graph.values[v].storage in made
                ]
            alive = [wire for wire in alive if read_last.get(wire, -1) > n]
            found.append(tuple(alive))
        return found
