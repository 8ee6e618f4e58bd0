"""Which operations a replay skips, and what it returns in their place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actckpt.data.graph import Graph, Op
from actckpt.data.profile import Profile
from actckpt.interpreting.regions import Placed, Replay, is_in_place, is_skippable, pruning_gain_s
from actckpt.tracing.signature import overload

Meta = tuple[tuple[int, ...], tuple[int, ...], int, str, str]
Window = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Source:
    """A kept tensor: (number of its save, -1), or (position of the captured operation, output).

    ``window`` is how it lay on its storage when it was traced: under other strides (a batch in
    channels-last order) its bytes mean something else.
    """

    key: tuple[int, int]
    window: Window


@dataclass(frozen=True, slots=True)
class Skipped:
    """One skipped operation: shapes of its tensor arguments, metadata of each output.

    ``sources[i]`` is the kept tensor that an output comes from, or None for a placeholder whose
    values nobody reads.
    """

    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[Meta, ...]
    sources: tuple[Source | None, ...]
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
        captured=frozenset(s.key[0] for s in sources.values() if s.key[1] >= 0),
        reads=frozenset(s.key[0] for s in sources.values() if s.key[1] < 0),
    )


def _first_shape(graph: Graph, op: Op) -> tuple[int, ...] | None:
    return graph.values[op.inputs[0]].shape if op.inputs else None


def _sources(
    graph: Graph, placed: Placed, replay: Replay, position: dict[int, int]
) -> dict[int, Source]:
    """Storage -> the kept tensor that lies in it."""
    found: dict[int, Source] = {}

    def enter(key: tuple[int, int], value_id: int) -> None:
        value = graph.values[value_id]
        window = (value.shape, value.stride, value.offset)
        found.setdefault(value.storage, Source(key, window))

    for number, save in enumerate(placed.saves):
        if save in placed.kept:
            enter((number, -1), graph.saves[save].value)
    for op in placed.captured:
        if op in position:
            for n, value in enumerate(graph.ops[op].outputs):
                enter((position[op], n), value)
    return {s: source for s, source in found.items() if s in replay.cached}


def _skip(graph: Graph, index: int, sources: dict[int, Source]) -> Skipped | None:
    """How to skip an operation, or None if it must run."""
    if not is_skippable(graph, index):
        return None
    op = graph.ops[index]
    values = [graph.values[v] for v in op.outputs]
    return Skipped(
        inputs=tuple(graph.values[v].shape for v in op.inputs),
        outputs=tuple((v.shape, v.stride, v.offset, v.dtype, v.device) for v in values),
        sources=tuple(sources.get(v.storage) for v in values),
        single=len(overload(op.name)._schema.returns) == 1,
        in_place=is_in_place(graph, index),
    )


def placeholder(meta: Meta) -> torch.Tensor:
    """A tensor of that shape, normally allocated, whose values nobody reads."""
    shape, stride, _, dtype, device = meta
    return torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device)


def window(tensor: torch.Tensor) -> Window:
    """How a tensor lies on its storage."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
