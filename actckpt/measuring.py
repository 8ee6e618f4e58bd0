"""Real training steps, measured; afterwards everything is as before."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.data.graph import Category
from actckpt.profiler.census import resident_bytes, storages, tensors
from actckpt.profiler.meter import AllocatorMeter
from actckpt.reporting.measurement import Measurement
from actckpt.tracing.compiled import as_written
from actckpt.tracing.fake import random_states
from actckpt.tracing.lightning import TRAINING_STEP, without_logging
from actckpt.tracing.mode import flat_outputs, flat_tensors
from actckpt.tracing.optimizers import inside, kept_as_they_are
from actckpt.tracing.optimizing import Optimizing, held, inner
from actckpt.tracing.parametrized import cached_anew
from actckpt.tracing.reached import outside_restored
from actckpt.tracing.step import Step, find_loss, run_step
from actckpt.tracing.tracer import model_device


def measure_step(model: nn.Module, step: Step, steps: int) -> Measurement:
    """Peak bytes of one real step by the allocator, and the median time of ``steps`` others.

    Weights, buffers, gradients, optimizer state and random states are afterwards as before. With
    ``step.accumulate`` gradients are resident when a step begins.

    Args:
        steps: timed steps, at least 1; two more run before and beside them.
    """
    device = torch.device(model_device(model))
    quiet = without_logging(model) if step.entry == TRAINING_STEP else nullcontext()
    with quiet, _put_back(model, step), _Stepping(model, step.optimizers) as stepping:
        _clear(model, step)
        if "torch._dynamo" in sys.modules:
            _one(model, step, stepping)  # warm-up of what is compiled: it rests under a mode
            _clear(model, step)
        with as_written(), _Foreign(device) as foreign:
            # warm-up: optimizer state, kernels, the first step's checks
            loss = _one(model, step, stepping)
        meter, split, added = _metered(model, step, stepping, device, foreign)
        times = []
        for _ in range(steps):
            _clear(model, step)
            _synchronize(device)
            begin = time.perf_counter()
            _one(model, step, stepping)
            _synchronize(device)
            times.append(time.perf_counter() - begin)
    return Measurement(
        peak_bytes=sum(split.values()),
        added_bytes=added,
        reserved_bytes=meter.reserved_bytes,
        step_s=statistics.median(times),
        step_s_spread=(min(times), max(times)),
        loss=loss,
        steps=steps,
        split={str(k): v for k, v in split.items()},
    )


def _one(model: nn.Module, step: Step, stepping: _Stepping) -> float | None:
    seen: list[float] = []

    def noted(output: Any) -> torch.Tensor | None:
        loss = find_loss(output, step)
        if loss is not None:
            seen.append(loss.detach())  # type: ignore[arg-type]  # read after the step
        return loss

    stepping.stepped.clear()
    with cached_anew():
        run_step(model, step, loss_of=noted)
    for one in step.optimizers:
        if id(one.optimizer) not in stepping.stepped:  # else a hook has stepped it in backward
            one.optimizer.step()
    return float(seen[0]) if seen else None


def _clear(model: nn.Module, step: Step) -> None:
    # a measurement within autocast: every step casts its weights, as in a context of its own
    torch.clear_autocast_cache()
    for p in model.parameters():
        if not step.accumulate:
            p.grad = None


class _Foreign(TorchDispatchMode):
    """Notes the tensors of a step that nothing in it made: residents, and what a loss closes over.

    They exist beside what is known to be resident, and count as long as they do.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self._made: set[int] = set()
        self._found: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for t in flat_tensors((*args, *kwargs.values())):
            for storage in storages(t):
                if storage._cdata not in self._made and t.device == self.device:
                    self._found[storage._cdata] = weakref.ref(storage)
        out = func(*args, **kwargs)
        self._made.update(s._cdata for t in flat_outputs(out) for s in storages(t))
        return out

    def bytes_beside(self, residents: Iterable[torch.Tensor]) -> int:
        """Bytes of what was noted and still exists, without ``residents``."""
        known = {s._cdata for t in residents for s in storages(t)}
        alive = {key: ref() for key, ref in self._found.items() if key not in known}
        return sum(s.nbytes() for s in alive.values() if s is not None)


def _metered(
    model: nn.Module, step: Step, stepping: _Stepping, device: torch.device, foreign: _Foreign
) -> tuple[AllocatorMeter, dict[Category, int], int]:
    """The meter, the split at the peak, and the peak above residents and arrived gradients."""
    _clear(model, step)
    gc.collect()
    batch = (step.call.args, step.call.kwargs, step.target)
    state = [t for o in stepping.optimizers for t in held(o, model.modules())]
    residents = resident_bytes(model, state, batch)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    known = tensors([*model.parameters(), *model.buffers(), *grads, state, batch])
    residents[Category.CONSTANT] = foreign.bytes_beside(known)
    meter = AllocatorMeter(device)
    arrived = [0]  # bytes of gradients that are there after each mark

    def settled(p: torch.Tensor) -> None:
        grad = p.grad
        size = sum(s.nbytes() for s in storages(grad)) if grad is not None else 0
        arrived.append(arrived[-1] + (0 if step.accumulate else size))
        meter.mark()

    hooks = [
        p.register_post_accumulate_grad_hook(settled) for p in model.parameters() if p.requires_grad
    ]
    try:
        with meter:
            _one(model, step, stepping)
    finally:
        for hook in hooks:
            hook.remove()
    peaks = [s.peak_bytes for s in meter.segments]
    at = max(range(len(peaks)), key=lambda i: peaks[i])
    split = dict(residents)
    split[Category.GRADIENT] = split.get(Category.GRADIENT, 0) + arrived[at]
    split[Category.ACTIVATION] = peaks[at] - arrived[at]
    added = max(p - g for p, g in zip(peaks, arrived, strict=True))
    return meter, split, added


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _put_back(model: nn.Module, step: Step) -> Iterator[None]:
    """Copies on the CPU of everything that a step changes in a model; copied back on exit.

    What the model's code holds are the very objects of before.
    """
    grads = [
        (p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()
    ]
    try:
        with (
            random_states(),
            outside_restored(model, step.loss_fn),
            _values_kept([*model.parameters(), *model.buffers()]),
        ):
            yield
    finally:
        with torch.no_grad():
            for p, grad, saved in grads:
                if grad is not None and saved is not None:
                    grad.copy_(saved)
                p.grad = grad


@contextmanager
def _values_kept(found: Iterable[torch.Tensor]) -> Iterator[None]:
    """The values in tensors are on exit as they were."""
    kept = [(t, t.detach().to("cpu", copy=True)) for t in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in kept:
                t.copy_(value)


class _Stepping:
    """The optimizers that step while this is open: given ones, and those that hooks step.

    On exit each of them is as it was, and holds the very objects of before.

    Attributes:
        optimizers: those seen so far.
        stepped: ids of those that stepped inside backward.
    """

    def __init__(self, model: nn.Module, given: Iterable[Optimizing]) -> None:
        self.model = model
        self.given = [one.optimizer for one in given]
        self.optimizers: list[Any] = []
        self.stepped: set[int] = set()
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._stack = ExitStack()
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        for optimizer in self.given:
            self._keep(optimizer)
        self._stack.callback(register_optimizer_step_pre_hook(self._before).remove)
        self._stack.callback(register_optimizer_step_post_hook(self._after).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _keep(self, optimizer: Any) -> None:
        self.optimizers.append(optimizer)
        self._known.update(map(id, (optimizer, *inner(optimizer))))
        found = inside([optimizer], [self.model])
        values = [t for t in found if isinstance(t, torch.Tensor) and id(t) not in self._own]
        self._stack.enter_context(_values_kept(values))
        self._stack.enter_context(kept_as_they_are([optimizer], [self.model]))

    def _before(self, optimizer: Any, *_: Any) -> None:
        if id(optimizer) not in self._known and any(
            id(p) in self._own for group in optimizer.param_groups for p in group["params"]
        ):
            self._keep(optimizer)

    def _after(self, optimizer: Any, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            self.stepped.add(id(optimizer))
