"""Activations that several recomputations read: held once, however many of them read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from actckpt.pricing.effect import Effect
from actckpt.pricing.simulate import Pricer


@dataclass(frozen=True, slots=True)
class Hold:
    """An activation that is kept because recomputations read it.

    Attributes:
        storage: which.
        bytes: its size.
        start: operation at whose end it would be let go of otherwise.
        stop: operation before which the recomputation that reads it last is done.
        saved: autograd saves it, too: to be counted only where that is dropped.
    """

    storage: int
    bytes: int
    start: int
    stop: int
    saved: bool

    def added_to(self, levels: np.ndarray, sign: int = 1) -> None:
        """Adds its bytes at the instants at which it is held."""
        levels[self.start : self.stop] += sign * self.bytes


def holds_of(pricer: Pricer, effects: Iterable[Effect]) -> tuple[Hold, ...]:
    """What recomputations hold until they are done. Others may hold it, too, or drop its save."""
    graph = pricer.graph
    until: dict[int, int] = {}
    for effect in effects:
        for sid, stop in effect.holds:
            until[sid] = max(until.get(sid, 0), stop)
    found = []
    for sid, stop in until.items():
        end, died = int(pricer.ends[sid]), int(pricer.died[sid])
        hold = (
            Hold(sid, graph.storages[sid].bytes, died, min(stop, end), saved=True)
            if end > died
            else Hold(sid, graph.storages[sid].bytes, end, stop, saved=False)
        )
        if hold.stop > hold.start:
            found.append(hold)
    return tuple(found)


def joined(holds: Sequence[Sequence[Hold]], dropped: Container[int]) -> dict[Hold, tuple[int, ...]]:
    """What is held, as long as its last reader may need it -> indices of the choices that hold it.

    Args:
        holds: of each choice.
        dropped: what some choice drops.
    """
    longest: dict[int, Hold] = {}
    readers: dict[int, list[int]] = {}
    for j, of_choice in enumerate(holds):
        for hold in of_choice:
            if hold.saved and hold.storage not in dropped:
                continue
            known = longest.get(hold.storage)
            if known is None or hold.stop > known.stop:
                longest[hold.storage] = hold
            readers.setdefault(hold.storage, []).append(j)
    return {longest[s]: tuple(readers[s]) for s in sorted(longest)}
