"""One training step: forward, loss, backward, optimizer. Traced, dry-run and measured alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actckpt.data.graph import Phase
from actckpt.errors import TraceError
from actckpt.tracing.backwards import Backward, run_backwards
from actckpt.tracing.call import Call, LossFn, tensors
from actckpt.tracing.draws import Draws
from actckpt.tracing.forwards import FORWARD
from actckpt.tracing.guards import Answers
from actckpt.tracing.optimizing import Optimizing
from actckpt.tracing.stand_in import StandIn


@dataclass(frozen=True, slots=True)
class Step:
    """What a user's training step is made of; ``target`` is for ``loss_fn(output, target)``.

    ``stand_in``: the accelerator that it is to be planned for, where that is not here.
    ``draws``: what random generators give it while it is traced and dry-run.
    ``answers``: what it is told where it asks whether something holds of unknown values.
    ``entry``: the method that is called; "forward" stands for calling the module.
    ``within``: the call is what the model's own forward was given: what stands round that forward
    (a wrapper, hooks before it) is running already, and is not run again.
    ``outside``: what of it is known to be done to the output.
    ``backwards``: those that it runs over one graph; () is one that keeps nothing.
    """

    call: Call
    loss_fn: LossFn | None = None
    target: Any = None
    optimizers: tuple[Optimizing, ...] = ()
    accumulate: bool = False
    stand_in: StandIn | None = None
    draws: Draws = Draws.AS_THEY_COME
    answers: Answers = ()
    entry: str = FORWARD
    within: bool = False
    outside: Callable[[Any], Any] | None = None
    backwards: tuple[Backward, ...] = ()

    @property
    def second_order(self) -> bool:
        """Whether one of the backwards gives gradients a graph themselves."""
        return any(b.second_order for b in self.backwards)


def find_loss(output: Any, step: Step) -> torch.Tensor | None:
    """The scalar that backward starts from, or None if the step does not show one.

    Raises:
        TraceError: the loss is not a scalar, or does not require gradients.
    """
    if step.loss_fn is not None:
        if step.target is not None:
            loss: Any = step.loss_fn(output, step.target)
        else:
            loss = step.loss_fn(output)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            found = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TraceError(f"loss_fn must return a scalar tensor; found {found}")
    elif isinstance(output, torch.Tensor):
        loss = output if output.numel() == 1 else None
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        return None
    if not loss.requires_grad:
        raise TraceError(
            "the loss does not require gradients: is every parameter frozen, or grad disabled?"
        )
    return loss


@contextmanager
def outside_autocast(device_type: str) -> Iterator[None]:
    """Where a user's backward runs, though the step may have been given inside autocast.

    Leaving autocast drops its casts of the weights, which backward would otherwise find resident.
    """
    torch.clear_autocast_cache()
    with torch.autocast(device_type, enabled=False):
        yield


def run_step(
    model: nn.Module,
    step: Step,
    enter: Callable[[Phase], None] = lambda _: None,
    loss_of: Callable[[Any], torch.Tensor | None] | None = None,
    returned: Callable[[torch.Tensor], None] = lambda _: None,
    kept: Callable[[], None] = lambda: None,
) -> bool:
    """Runs forward, loss and backward; returns whether a loss was seen.

    The output stays referenced until backward has ended, as in ``out = model(x)`` of a user's loop.

    Args:
        enter: told of each phase before it begins.
        loss_of: finds the loss in the output; `find_loss` if None.
        returned: told of gradients that go to the user instead of the parameters.
        kept: told when a backward has ended that is not the last over the graph.

    Raises:
        TraceError: no output requires gradients.
    """
    enter(Phase.FORWARD)
    called = model if step.entry == FORWARD else getattr(model, step.entry)
    output = called(*step.call.args, **step.call.kwargs)
    enter(Phase.LOSS)
    if step.outside is not None:
        output = step.outside(output)
    loss = find_loss(output, step) if loss_of is None else loss_of(output)
    if loss is not None:
        enter(Phase.BACKWARD)
        with outside_autocast(loss.device.type):
            if step.backwards:
                run_backwards(model, step.call, step.backwards, [loss], [None], returned, kept)
            else:
                loss.backward()
        return True
    roots = [t for t in tensors(output) if t.requires_grad]
    if not roots:
        raise TraceError(
            "no output of the model requires gradients: is every parameter frozen, "
            "or grad disabled?"
        )
    seeds = [torch.ones_like(t) for t in roots]
    enter(Phase.BACKWARD)
    with outside_autocast(roots[0].device.type):
        if step.backwards:
            run_backwards(model, step.call, step.backwards, roots, seeds, returned, kept)
        else:
            torch.autograd.backward(roots, seeds)
    return False
