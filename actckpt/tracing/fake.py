"""A model on fake tensors for a while: nothing allocated, nothing run, nothing left behind."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from actckpt.tracing.accelerator_ops import AcceleratorOps
from actckpt.tracing.attached import dressed, made_of_fakes, objects_faked
from actckpt.tracing.call import map_tensors
from actckpt.tracing.compiled import as_written
from actckpt.tracing.containers import containers, same_items
from actckpt.tracing.draws import steer
from actckpt.tracing.forwards import bare
from actckpt.tracing.guards import Answers, Guards
from actckpt.tracing.lightning import TRAINING_STEP, without_logging
from actckpt.tracing.optimizers import Copier, kept_as_they_are, without_hooks
from actckpt.tracing.outlined import device_of, values_of
from actckpt.tracing.parametrized import cached_as
from actckpt.tracing.parts import made_of, parts, ragged
from actckpt.tracing.reached import outside_restored
from actckpt.tracing.real_values import attach_real
from actckpt.tracing.signature import SPARSE
from actckpt.tracing.stand_in import StandIn
from actckpt.tracing.step import Step
from actckpt.tracing.users_hooks import users_hooks_replaced

TRACING = threading.local()
_DICTS = (dict, OrderedDict, defaultdict)


class FakeWorld:
    """One `FakeTensorMode` and the fakes of the real tensors met in it (one fake per tensor).

    Under a ``stand_in`` they are fake CPU tensors, of meta tensors too, and stand for its own.
    """

    def __init__(self, stand_in: StandIn | None = None, answers: Answers = ()) -> None:
        self.stand_in = stand_in
        self.guards = Guards(answers)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # of what exists beside parameters, buffers and batch: attributes of k-bit weights
        self.attached: list[torch.Tensor] = []

    def fake(self, real: torch.Tensor) -> torch.Tensor:
        """The fake of ``real``: same shape, strides, dtype, device and storage identity."""
        if isinstance(real, FakeTensor):
            return real
        found = self._fakes.get(id(real))
        if found is None:
            outlined = device_of(real)
            if outlined is not None:
                made = self._of_meta(real, outlined)
                if (values := values_of(real)) is not None:
                    attach_real(made, values)
            else:
                meta = self.stand_in is not None and real.device.type == "meta"
                made = self._of_meta(real, torch.device("cpu")) if meta else self._of(real)
                attach_real(made, real)
            if real.layout in SPARSE:
                # without their base: they are views of the sparse tensor
                made_of(made, tuple(self.fake(part.data) for part in parts(real)))
            # the real one is kept so that its id is not reused by another tensor
            found = self._fakes[id(real)] = (real, made)
        return found[1]

    def _of(self, real: torch.Tensor) -> torch.Tensor:
        if real.is_nested:
            raise ragged("one is an argument, a buffer or an attribute")
        if real.is_leaf:
            return dressed(self.mode.from_tensor(real), real, self.fake)
        # what another model made: the step traced ends where it came in
        return self.mode.from_tensor(real.detach()).requires_grad_(real.requires_grad)

    def _of_meta(self, real: torch.Tensor, device: torch.device) -> torch.Tensor:
        # `data`, unlike `detach`, shares no version counter with the model's own tensor
        made: torch.Tensor = self.mode.fake_tensor_converter.from_meta_and_device(
            self.mode, real.data, device
        )
        if isinstance(real, nn.Parameter):
            return nn.Parameter(made, requires_grad=real.requires_grad)
        return made.requires_grad_(real.requires_grad)


@contextmanager
def faked(model: nn.Module, step: Step) -> Iterator[tuple[FakeWorld, Step]]:
    """Makes ``model`` and ``step`` fake; on exit everything real is as it was.

    That covers every module's ``__dict__`` (and the lists, dicts and sets in it), gradients, and
    the random states of Python, NumPy and torch.

    Yields:
        (world, fake step): the fake step has fake batch, target and optimizers.
    """
    world = FakeWorld(step.stand_in, step.answers)
    modules = list(model.modules())
    dicts = [(m, dict(m.__dict__), list(containers(m))) for m in modules]
    # others have none, but where computed weights stand in their place (`functional_call`)
    parameters = [p for p in model.parameters() if p.is_leaf]
    grads = [p.grad for p in parameters]
    with ExitStack() as stack:
        stack.enter_context(users_hooks_replaced())
        stack.enter_context(random_states())
        steer(step.draws)
        stack.enter_context(outside_restored(model, step.loss_fn))
        stack.enter_context(as_written())
        # making a fake looks at .grad, about which torch warns where the real one has a graph
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        stack.callback(_restore_grads, parameters, grads)
        for module, attributes, contents in dicts:
            stack.callback(_restore, module, attributes, contents)
        stack.enter_context(_answers_as_real())
        world.attached = stack.enter_context(objects_faked(modules, world.fake))
        stack.enter_context(made_of_fakes())
        for module in modules:
            _swap(module, world)
        stack.enter_context(cached_as(world.fake))
        # autocast caches weight casts by tensor: neither world may see the other's
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        optimizers = step.optimizers
        if optimizers:
            stack.enter_context(kept_as_they_are([o.optimizer for o in optimizers], modules))
            stack.enter_context(without_hooks())
            copier = Copier(world.fake, modules, elsewhere=step.stand_in is not None)
            optimizers = tuple(replace(o, optimizer=copier.copy(o.optimizer)) for o in optimizers)
        fake_step = Step(
            call=map_tensors(step.call, world.fake),
            loss_fn=step.loss_fn,
            target=map_tensors(step.target, world.fake),
            optimizers=optimizers,
            accumulate=step.accumulate,
            stand_in=step.stand_in,
            draws=step.draws,
            answers=step.answers,
            entry=step.entry,
            within=step.within,
            outside=step.outside,
            backwards=step.backwards,
        )
        if step.within:
            stack.enter_context(bare(model, step.entry))
        if step.entry == TRAINING_STEP:
            stack.enter_context(without_logging(model))
        TRACING.active, TRACING.stand_in = True, step.stand_in
        stack.callback(TRACING.__dict__.update, active=False, stand_in=None)
        if step.stand_in is not None:
            stack.enter_context(AcceleratorOps(step.stand_in))
        yield world, fake_step


def is_tracing() -> bool:
    """Whether this thread is inside `faked`."""
    return bool(getattr(TRACING, "active", False))


def stands_in() -> bool:
    """Whether fake CPU tensors stand for an accelerator's in this thread."""
    return getattr(TRACING, "stand_in", None) is not None


def _restore(
    module: nn.Module, attributes: dict[str, Any], contents: list[tuple[str, Any, Any]]
) -> None:
    module.__dict__.clear()
    module.__dict__.update(attributes)
    for _, container, saved in contents:
        if same_items(container, saved):
            continue  # read-only ones (diffusers' configs) would refuse
        if isinstance(container, list):
            container[:] = saved
        else:
            container.clear()
            container.update(saved)


def _restore_grads(parameters: list[nn.Parameter], grads: list[torch.Tensor | None]) -> None:
    for p, g in zip(parameters, grads, strict=True):
        if p.grad is not g:
            p.grad = g


def _swap(module: nn.Module, world: FakeWorld) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        return  # its tables are C++'s, and its weights are made fake on sight
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                table[name] = world.fake(tensor)  # type: ignore[assignment]
    for name, value in list(module.__dict__.items()):
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, torch.Tensor):
            module.__dict__[name] = world.fake(value)
        # others are met on sight: a container of a kind of its own may refuse
        elif type(value) is list and any(isinstance(v, torch.Tensor) for v in value):
            value[:] = [world.fake(v) if isinstance(v, torch.Tensor) else v for v in value]
        elif type(value) in _DICTS and any(isinstance(v, torch.Tensor) for v in value.values()):
            for key, v in list(value.items()):
                if isinstance(v, torch.Tensor):
                    value[key] = world.fake(v)


@contextmanager
def random_states() -> Iterator[None]:
    """Python's, NumPy's and torch's generators are afterwards as before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _answers_as_real() -> Iterator[None]:
    """Hugging Face asks whether a tensor is fake and takes another path if so: answer no."""
    patched: list[tuple[Any, str, Callable[..., Any]]] = []
    module: Any = sys.modules.get("transformers.utils.import_utils")
    if module is not None and hasattr(module, "is_fake_tensor"):
        patched.append((module, "is_fake_tensor", module.is_fake_tensor))
        module.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        for owner, name, original in patched:
            setattr(owner, name, original)
