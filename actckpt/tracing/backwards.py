"""The backwards of a step that runs several over one graph: as they were seen, and run alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from actckpt.tracing.call import Call, tensors


@dataclass(frozen=True, slots=True)
class Backward:
    """One backward over the graph of a forward.

    Attributes:
        keeps: the graph is kept for another one (``retain_graph``, ``create_graph``).
        second_order: the gradients have a graph themselves (``create_graph``).
        into_grad: gradients are added to the parameters' ``.grad``.
        returned: parameters whose gradients go to the caller instead (``autograd.grad``), who is
            taken to hold them until the last backward has ended.
        batch: gradients of the batch go to the caller.
    """

    keeps: bool = False
    second_order: bool = False
    into_grad: bool = True
    returned: tuple[str, ...] = ()
    batch: bool = False

    def joined(self, other: Backward) -> Backward:
        """One that does what either does."""
        return Backward(
            self.keeps or other.keeps,
            self.second_order or other.second_order,
            self.into_grad or other.into_grad,
            tuple(dict.fromkeys((*self.returned, *other.returned))),
            self.batch or other.batch,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Backward:
        """What `to_json` wrote."""
        return cls(**{**data, "returned": tuple(data["returned"])})


def joined(a: Sequence[Backward], b: Sequence[Backward]) -> tuple[Backward, ...]:
    """Backwards that do what those of either step do."""
    pairs = zip_longest(a, b)
    return tuple(y if x is None else x if y is None else x.joined(y) for x, y in pairs)


def run_backwards(
    model: nn.Module,
    call: Call,
    backwards: Sequence[Backward],
    roots: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor | None],
    returned: Callable[[torch.Tensor], None],
    kept: Callable[[], None],
) -> None:
    """Runs them one after another, each from all ``roots``.

    Of gradients that have a graph the squares are summed, which the later ones begin from, too.

    Args:
        returned: told of each gradient that the caller is taken to hold.
        kept: told at the end of each but the last.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batch = [t for t in tensors(call) if t.requires_grad]
    roots, seeds = list(roots), list(seeds)
    if backwards[-1].second_order:
        backwards = [*backwards, Backward()]
    held = []
    last: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for number, b in enumerate(backwards):
        keeps = b.keeps or number < len(backwards) - 1
        if b.into_grad and not b.second_order:
            torch.autograd.backward(roots, seeds, retain_graph=keeps)
            if keeps:
                kept()
            continue
        inputs: list[torch.Tensor] = [parameters[n] for n in b.returned if n in parameters]
        inputs += batch if b.batch else []
        inputs = inputs or list(parameters.values())
        found = torch.autograd.grad(roots, inputs, seeds, keeps, b.second_order, allow_unused=True)
        for g in found:
            if g is not None:
                returned(g)
        held.append(found)
        last = list(zip(inputs, found, strict=True))
        if b.second_order:
            squares = [g.square().sum() for g in found if g is not None and g.requires_grad]
            if squares:
                roots.append(torch.stack(squares).sum())
                seeds.append(None)
        if keeps:
            kept()
    if not any(b.into_grad for b in backwards):  # the caller makes of them what the optimizer takes
        held.clear()
        for tensor, gradient in last:
            if isinstance(tensor, nn.Parameter) and gradient is not None:
                tensor.grad = gradient.detach()
