"""Which operations a replay skips, and what it returns in their place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actckpt.graph import Graph, Op
from actckpt.profile import Profile
from actckpt.regions import Placed, Replay, is_in_place, is_skippable, pruning_gain_s
from actckpt.signature import overload

Meta = tuple[tuple[int, ...], tuple[int, ...], int, str, str]


@dataclass(frozen=True, slots=True)
class Skipped:
    """One skipped operation: metadata of each output, and the kept tensor that it comes from.

    ``sources[i]`` is (number of the kept save, -1), or (position of a captured operation, output),
    or None for a placeholder whose values nobody reads.
    """

    outputs: tuple[Meta, ...]
    sources: tuple[tuple[int, int] | None, ...]
    single: bool
    in_place: bool


@dataclass(frozen=True, slots=True)
class Pruning:
    """The operations of a region's replay in order.

    ``actions[i]`` is None to run ``names[i]``. ``shapes[i]`` is the shape of its first tensor
    argument: a run with other shapes is replayed whole. ``captured`` are the positions of
    operations whose outputs are kept when the region is recorded, since autograd does not;
    ``reads`` the numbers of the kept saves that a skipped operation returns.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    actions: tuple[Skipped | None, ...]
    captured: frozenset[int]
    reads: frozenset[int]


def pruning_of(
    graph: Graph, placed: Placed, replay: Replay, profile: Profile | None
) -> Pruning | None:
    """The pruning of a region's replay, or None if running everything is as fast."""
    if profile is None or pruning_gain_s(graph, placed, replay, profile) <= 0:
        return None
    position = {op: n for n, op in enumerate(replay.ops)}
    sources = _sources(graph, placed, replay, position)
    return Pruning(
        names=tuple(graph.ops[op].name for op in replay.ops),
        shapes=tuple(_first_shape(graph, graph.ops[op]) for op in replay.ops),
        actions=tuple(
            None if op in replay.needed else _skip(graph, op, sources) for op in replay.ops
        ),
        captured=frozenset(position[c] for c in placed.captured if c in position),
        reads=frozenset(number for number, output in sources.values() if output < 0),
    )


def _first_shape(graph: Graph, op: Op) -> tuple[int, ...] | None:
    return graph.values[op.inputs[0]].shape if op.inputs else None


def _sources(
    graph: Graph, placed: Placed, replay: Replay, position: dict[int, int]
) -> dict[int, tuple[int, int]]:
    """Storage -> (number of the kept save, -1), or (position of the captured op, output)."""
    found: dict[int, tuple[int, int]] = {}
    for number, save in enumerate(placed.saves):
        if save in placed.kept:
            found.setdefault(graph.values[graph.saves[save].value].storage, (number, -1))
    for op in placed.captured:
        if op in position:
            for n, value in enumerate(graph.ops[op].outputs):
                found.setdefault(graph.values[value].storage, (position[op], n))
    return {s: source for s, source in found.items() if s in replay.cached}


def _skip(graph: Graph, index: int, sources: dict[int, tuple[int, int]]) -> Skipped | None:
    """How to skip an operation, or None if it must run."""
    if not is_skippable(graph, index):
        return None
    op = graph.ops[index]
    values = [graph.values[v] for v in op.outputs]
    return Skipped(
        outputs=tuple((v.shape, v.stride, v.offset, v.dtype, v.device) for v in values),
        sources=tuple(sources.get(v.storage) for v in values),
        single=len(overload(op.name)._schema.returns) == 1,
        in_place=is_in_place(graph, index),
    )


def placeholder(meta: Meta) -> torch.Tensor:
    """A tensor of that shape, normally allocated, whose values nobody reads."""
    shape, stride, _, dtype, device = meta
    return torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device)
