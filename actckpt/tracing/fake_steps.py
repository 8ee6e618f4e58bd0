"""The steps of optimizers on fake tensors: after backward, or inside of it."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actckpt.tracing.optimizers import inside
from actckpt.tracing.optimizing import Optimizing, inner, outermost

_AUTOGRAD = "/torch/autograd/__init__.py"
# of a step for whose sake the graph of the forward stays, with all that it holds
THROUGH_GRAPH = "its step goes backward through the forward again"
# steps to fill queues, at most
_MOST_STEPS = 64
# parts of file names that say nothing of whose code asked
_MACHINERY = ("/torch/_", "/torch/utils/", "/actckpt/", "/torch/optim/optimizer.py")


class FakeSteps:
    """The steps of fake optimizers: the first creates the state, the others are steady ones.

    Attributes:
        untraced: number of each optimizer whose step asks for what only real tensors have, and why
            it could not be traced. Its steady step takes what was measured.
    """

    def __init__(self, optimizers: tuple[Optimizing, ...], device: str) -> None:
        self.optimizers = optimizers
        self.device = device
        self.untraced: dict[int, str] = {}
        self._instead: dict[int, list[Any]] = {}

    def begin(self, number: int) -> None:
        """The first step."""
        optimizer = self.optimizers[number].optimizer
        why = _stepped(optimizer)
        if why and (wrapped := outermost(inner(optimizer))):
            # a wrapper that wants a closure, as SAM's
            self._instead[number] = wrapped
            why = next(filter(None, map(_stepped, wrapped)), "")
        for _ in range(_to_fill(optimizer) if not why else 0):
            why = why or _stepped(optimizer)
        if why:
            self.untraced[number] = f"{self.optimizers[number].name}: {why}"

    def steady(self, number: int) -> None:
        """A step that finds its state."""
        one = self.optimizers[number]
        if number not in self.untraced:
            why = ""
            for optimizer in self._instead.get(number, [one.optimizer]):
                why = why or _stepped(optimizer)
            if not why:
                return
            self.untraced[number] = f"{one.name}: {why}"
        if one.temporary_bytes:
            torch.empty(one.temporary_bytes, dtype=torch.uint8, device=self.device)

    def after_backward(self) -> list[int]:
        """Numbers of those that step after backward."""
        return [n for n, one in enumerate(self.optimizers) if not one.in_backward]

    @contextmanager
    def in_backward(self, step: Callable[[int], None]) -> Iterator[Callable[[], None]]:
        """Hooks that step the others inside backward, for as long as the context lasts.

        A fake parameter would keep its hook for good, and that everything that ``step`` knows.

        Args:
            step: what is done when the last gradient of an optimizer has arrived.

        Yields:
            To be called after backward: those to which not all gradients came step then.
        """
        waiting: dict[int, set[int]] = {}

        def end(number: int) -> None:
            del waiting[number]
            step(number)
            if self.optimizers[number].frees:
                for p in self.optimizers[number].parameters():
                    p.grad = None

        def arrived(p: torch.Tensor, number: int) -> None:
            if number in waiting:
                waiting[number].discard(id(p))
                if not waiting[number]:
                    end(number)

        def finish() -> None:
            for number in list(waiting):
                if any(p.grad is not None for p in self.optimizers[number].parameters()):
                    end(number)

        with ExitStack() as hooks:
            for number, one in enumerate(self.optimizers):
                if one.in_backward:
                    trained = [p for p in one.parameters() if p.requires_grad]
                    waiting[number] = {id(p) for p in trained}
                    for p in trained:
                        hook = partial(arrived, number=number)
                        hooks.callback(p.register_post_accumulate_grad_hook(hook).remove)
            yield finish


def _to_fill(optimizer: Any) -> int:
    """Steps until the queues inside of an optimizer are as long as they get."""
    queues = (x for x in inside([optimizer]) if isinstance(x, deque) and x.maxlen is not None)
    missing = [
        q.maxlen - len(q)
        for q in queues
        if q.maxlen is not None and any(isinstance(x, torch.Tensor) for x in inside([q]))
    ]
    return min(max(missing, default=0), _MOST_STEPS)


def _stepped(optimizer: Any) -> str:
    """Steps a fake optimizer; "" or why it could not be done."""
    try:
        optimizer.step()
    except Exception as error:  # code of anybody's, to which only the values are missing
        return _described(error)
    return ""


def _described(error: BaseException) -> str:
    """What went wrong in an optimizer's step, and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in _MACHINERY)]
    where = ""
    if own:
        where = f" at {'/'.join(Path(own[-1].filename).parts[-2:])}:{own[-1].lineno}"
    if any(f.filename.endswith(_AUTOGRAD) and f.name in ("grad", "backward") for f in frames):
        return f"{THROUGH_GRAPH}{where}"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{where} ({first:.60})"
