"""Replaces ``forward`` on the planned modules' instances, and puts it back."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.rewriting.bursting import Decoded
from actckpt.rewriting.learned import Learned
from actckpt.rewriting.program import Program, StageProgram
from actckpt.rewriting.run import CURRENT, Run
from actckpt.rewriting.scheduled import ScheduledRun
from actckpt.tracing.calls import resident_tables, residents
from actckpt.tracing.compiled import never_compiled
from actckpt.tracing.fake import is_tracing
from actckpt.tracing.forwards import FORWARD, TAKEN, Replaced, forward_of, replaced, wrapped
from actckpt.tracing.lightning import TRAINING_STEP, Unseen, unseen_logging
from actckpt.tracing.parametrized import Entries, cached_of, is_caching

logger = logging.getLogger("actckpt")

ABSENT = object()
# the number of the next node of autograd's graph in this thread
_next_node: Callable[[], int] = torch._C._autograd._get_sequence_nr
# the methods by which a model may be entered
ENTRIES = (FORWARD, TRAINING_STEP)


class Planner(Protocol):
    """Whoever decides the plan of a root; asked before every forward with gradients, told after."""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: str) -> None: ...

    def after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None: ...

    def copied(self, model: nn.Module) -> Planner: ...


class Rewrite:
    """One plan in force on one model. Never changes: another plan is another rewrite.

    Args:
        entries: the methods of the model that are planned as its forward, where several while
            none has been called yet.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        planner: Planner | None = None,
        check: bool = True,
        entries: tuple[str, ...] = (FORWARD,),
    ) -> None:
        self.root = weakref.ref(model)
        self.entries = entries
        self.program = program
        self.planner = planner
        self.checking = check
        self._runs = 0
        self._warned = False
        self._modules: dict[str, Any] = {}
        self._device_type: str | None = None
        self._contents: list[dict[str, Any]] | None = None
        calls = program.schedule.calls if program.schedule is not None else ()
        self._learned: list[Learned | None] = [None] * (len(calls) + 1)
        self._in_part: list[Learned | None] | None = None
        self.decoded: dict[int, Decoded] = {}
        # why a forward was not the traced one, if one was not
        self.diverged = ""
        # the most nodes that one forward has added to autograd's graph
        self.nodes = 0

    @property
    def runs(self) -> int:
        """How many forwards have begun under it."""
        return self._runs

    @property
    def device_type(self) -> str:
        """Device of the parameters, read when first needed: a copy may be in the making."""
        if self._device_type is None:
            model = self.root()
            parameters = model.parameters() if model is not None else iter(())
            self._device_type = next((p.device.type for p in parameters), "cpu")
        return self._device_type

    def module(self, path: str) -> nn.Module:
        """The module at ``path`` under the root."""
        ref = self._modules.get(path)
        module = ref() if ref is not None else None
        if module is None:
            root = self.root()
            if root is None:
                raise PlanError("the planned model no longer exists")
            module = root.get_submodule(path)
            self._modules[path] = weakref.ref(module)
        return module

    def residents(self) -> dict[int, torch.UntypedStorage]:
        """The storages of the model's parameters and buffers, by address.

        They are held, so that no activation gets the address of a buffer that was replaced.
        """
        if not self.program.regions:
            return {}
        tensors = (t for t in self.resident_tensors() if t.layout == torch.strided)
        storages = (t.untyped_storage() for t in tensors)
        return {s._cdata: s for s in storages}

    def resident_tensors(self) -> list[torch.Tensor]:
        """The model's parameters and buffers, in the order of their wires."""
        if self._contents is None:
            root = self.root()
            self._contents = [] if root is None else resident_tables(root)
        return residents(self._contents)

    def learned(self, whole: bool) -> list[Learned | None]:
        """What runs have seen of each call, and an entry that stays None.

        Args:
            whole: of those too that need not be compared.
        """
        schedule = self.program.schedule
        if whole or schedule is None or not schedule.stretches:
            return self._learned
        if self._in_part is None:
            passed = schedule.passed
            self._in_part = [None if n in passed else k for n, k in enumerate(self._learned)]
        return self._in_part

    def attributes(self, program: StageProgram) -> dict[tuple[str, str], Any]:
        """What a stage finds in the buffers and plain attributes that it rebinds.

        No tensors but buffers: an activation that was left behind would be held for longer, and
        the trace refuses a stage that reads one.
        """
        found: dict[tuple[str, str], Any] = {}
        for path, name in program.touches:
            module = self.module(path)
            if name in module._buffers:
                found[(path, name)] = module._buffers[name]
            elif not isinstance(value := module.__dict__.get(name, ABSENT), torch.Tensor):
                found[(path, name)] = value
        return found

    def put_attributes(self, values: dict[tuple[str, str], Any]) -> None:
        """Rebinds what `attributes` found."""
        for (path, name), value in values.items():
            module = self.module(path)
            if name in module._buffers:
                module._buffers[name] = value
            elif value is ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value

    def snapshots(self, program: StageProgram) -> dict[tuple[str, str], torch.Tensor]:
        """Copies of the buffers that a stage reads before it changes them."""
        found = {}
        for path, name, read in program.buffers:
            buffer = self.module(path)._buffers[name]
            if read and buffer is not None:
                found[(path, name)] = buffer.detach().clone()
        return found

    def warn_once(self, message: str) -> None:
        """Logs what does not go as planned, the first time."""
        if not self._warned:
            logger.warning("actckpt: %s", message)
            self._warned = True

    def diverge(self, reason: str) -> None:
        """A forward is not the traced one: it keeps everything from there on."""
        self.diverged = self.diverged or reason
        if is_tracing():
            return  # a dry run: the plan is not in force
        self.warn_once(
            f"a forward is not the one that was planned for: {reason}. Everything is kept from "
            "there on, which may take more memory than the budget"
        )

    def begin(self) -> Run | ScheduledRun:
        """A new forward pass. The first one's recomputations are compared bit by bit."""
        self._runs += 1
        if self._runs > 1:
            self.checking = False
        schedule = self.program.schedule
        return Run(self) if schedule is None else ScheduledRun(self, schedule)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewrite:
        root = memo.get(id(self.root()))
        if root is None:
            return self
        planner = self.planner.copied(root) if self.planner is not None else None
        clone = memo[id(self)] = Rewrite(root, self.program, planner, entries=self.entries)
        return clone

    def __reduce__(self) -> Any:
        # a loaded model keeps its plan; the loss and the optimizer that it was made with stay here
        return Rewrite, (self.root(), self.program, None, True, self.entries)


class _Table(NamedTuple):
    """Where one module keeps its own parameters and buffers: the very dictionaries."""

    path: str
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]


class PatchedForward(Replaced):
    """Stands in a module's ``__dict__`` as ``forward``; knows its module weakly.

    Weakly, so that a deep copy or an unpickled model runs its own weights.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        rewrite: Rewrite,
        original: Callable[..., Any] | None,
        name: str = FORWARD,
    ) -> None:
        super().__init__(module, original, name)
        self.path = path
        self.rewrite = rewrite
        self._tables: list[_Table] | None = None
        self._inside: list[weakref.ref[nn.Module]] | None = None

    @property
    def device_type(self) -> str:
        return self.rewrite.device_type

    def is_meant(self) -> bool:
        """Whether its plan's model exists and has this module where the plan says."""
        root = self.rewrite.root()
        try:
            return root is not None and root.get_submodule(self.path) is self.module
        except AttributeError:
            return False

    @property
    def __func__(self) -> Callable[..., Any]:
        """A function of the module and its arguments, as a method has.

        Who wraps that and binds it again (Accelerate) can copy the module: a copy finds its own.
        """
        if self.name != FORWARD:
            raise AttributeError("__func__")
        self.module.__dict__[TAKEN] = self
        return forward_of

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward underneath: `inspect.signature` looks here."""
        if self.original is not None:
            return self.original
        module = self.module
        bound: Callable[..., Any] = getattr(type(module), self.name).__get__(module)
        return bound

    def watched(self, program: StageProgram) -> list[tuple[torch.Tensor, int]]:
        """Parameters and buffers that the forward reads and does not change, with versions."""
        if self._tables is None:
            self._tables = [
                _Table(path, m._parameters, m._buffers)
                for path, m in self.module.named_modules(prefix=self.path)
                if m._parameters or m._buffers
            ]
        changed = {*program.touches, *((path, name) for path, name, _ in program.buffers)}
        found = [
            (p, p._version)
            for table in self._tables
            for p in table.parameters.values()
            if p is not None
        ]
        buffers = [
            (b, b._version)
            for table in self._tables
            for name, b in table.buffers.items()
            if b is not None and (table.path, name) not in changed
        ]
        return [*found, *buffers]

    def cached(self) -> Entries | None:
        """What `parametrize.cached` keeps of the parametrized tensors of the module."""
        return cached_of(self._modules()) if is_caching() else None

    def training(self) -> tuple[bool, ...]:
        """The ``training`` flag of the module and of each module inside it."""
        return tuple(m.training for m in self._modules())

    @contextmanager
    def as_training(self, flags: tuple[bool, ...]) -> Iterator[None]:
        """Puts the flags back for a while: the user may have called ``eval()`` in between."""
        found = self._modules()
        now = [m.training for m in found]
        try:
            for m, flag in zip(found, flags, strict=True):
                if m.training is not flag:
                    m.training = flag
            yield
        finally:
            for m, flag in zip(found, now, strict=True):
                if m.training is not flag:
                    m.training = flag

    def _modules(self) -> list[nn.Module]:
        if self._inside is None:
            self._inside = [weakref.ref(m) for m in self.module.modules()]
        return [m for ref in self._inside if (m := ref()) is not None]

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of a watched tensor, for messages."""
        named = (
            (f"{table.path}.{name}".lstrip("."), t)
            for table in self._tables or ()
            for name, t in (*table.parameters.items(), *table.buffers.items())
        )
        return next((name for name, t in named if t is tensor), "a parameter")

    @never_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.instead is not None:
            return self.instead(*args, **kwargs)
        if self.off:
            return self.run(args, kwargs)
        run = CURRENT.run
        if run is not None and (
            run.rewrite is self.rewrite or run.rewrite.root() is self.rewrite.root()
        ):
            return run.call(self, args, kwargs)
        if self.path or not torch.is_grad_enabled():
            return self.run(args, kwargs)
        if self.rewrite.planner is not None and is_tracing():
            return self.run(args, kwargs)  # a model that holds this one is looked at
        return self._root(args, kwargs)

    def _root(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise PlanError(
                "torch.func transforms do not go through a planned model: recomputation needs "
                "autograd's saved-tensor hooks, which they do not have. Call actckpt.revert(model) "
                "first"
            )
        if self.rewrite.planner is not None:
            self.rewrite.planner.before_forward(args, kwargs, self.name)
        # planning may have put another plan, and so another patch, in place
        patched = patch_of(self.module, self.module, self.name) or self
        previous = CURRENT.run
        training = self.name == TRAINING_STEP
        unseen = Unseen()
        quiet = unseen_logging(self.module, unseen) if training else nullcontext()
        rewrite = patched.rewrite
        CURRENT.run = run = rewrite.begin()
        first = _next_node()
        try:
            with quiet:
                output = run.call(patched, args, kwargs)
        finally:
            CURRENT.run = previous
            rewrite.nodes = max(rewrite.nodes, _next_node() - first - unseen.nodes)
        if self.rewrite.planner is not None:
            self.rewrite.planner.after_forward(args, kwargs, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedForward:
        from copy import deepcopy

        module = memo.get(id(self._module()))
        if module is None:
            return self
        rewrite, original = deepcopy(self.rewrite, memo), deepcopy(self.original, memo)
        clone = PatchedForward(module, self.path, rewrite, original, self.name)
        clone.off = self.off
        return clone

    def __reduce__(self) -> Any:
        return PatchedForward, (
            self._module(), self.path, self.rewrite, self.original, self.name,
        )  # fmt: skip


def patch_of(
    module: nn.Module, root: nn.Module | None = None, name: str = FORWARD
) -> PatchedForward | None:
    """The patch on a module, or under what stands there.

    Args:
        root: only the one of this model's plan: a module may be a part of several models.
        name: the method that it stands for.
    """
    found = (p for p in _patches(module, name) if root is None or p.rewrite.root() is root)
    return next(found, None)


def _patches(module: nn.Module, name: str = FORWARD) -> Iterator[PatchedForward]:
    """The patches on a module, each on top of the next."""
    found: Any = replaced(module, name)
    while isinstance(found, PatchedForward):
        yield found
        found = found.original


def install(rewrite: Rewrite, *, on_top: bool = False) -> None:
    """Puts a rewrite in force on its model, in place of any other.

    A patch that somebody has wrapped stays where it is, and follows the new plan. Where another
    model's patch stands, this one's goes on top.

    Args:
        on_top: of what others have put on the model itself since, whether it calls ours or not.
    """
    model = rewrite.root()
    if model is None:
        raise PlanError("the planned model no longer exists")
    uninstall(model)
    places = [(path, FORWARD) for path in set(rewrite.program.paths) - {""}]
    for path, name in (*places, *(("", entry) for entry in rewrite.entries)):
        module = rewrite.module(path)
        for other in list(_patches(module, name)):
            if not other.is_meant():
                _take_off(module, other)
        patched = patch_of(module, model, name)
        if patched is not None and not (on_top and not path):
            patched.path, patched.rewrite, patched.off = path, rewrite, False
        else:
            original = module.__dict__.get(name)
            module.__dict__[name] = PatchedForward(module, path, rewrite, original, name)


def uninstall(model: nn.Module) -> Rewrite | None:
    """Takes the rewrite off a model, if there is one, and returns it."""
    found = installed(model)
    for module in model.modules():
        for name in ENTRIES if module is model else (FORWARD,):
            patched = patch_of(module, model, name)
            if patched is not None:
                _take_off(module, patched)
    return found


def _take_off(module: nn.Module, patched: PatchedForward) -> None:
    """Removes one patch of a module; one that is wrapped passes calls on from now on."""
    name = patched.name
    above = next((p for p in _patches(module, name) if p.original is patched), None)
    if above is not None:
        above.original = patched.original
        return
    if wrapped(module, name) is patched:
        patched.off = True
        return
    if module.__dict__.get(TAKEN) is patched:
        del module.__dict__[TAKEN]
    below: Any = patched.original
    if below is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = below
    if isinstance(below, Replaced):
        below.stands()


@contextmanager
def in_force(model: nn.Module, rewrite: Rewrite) -> Iterator[None]:
    """A rewrite on a model that has none, for a while."""
    install(rewrite)
    try:
        yield
    finally:
        uninstall(model)


def installed(model: nn.Module) -> Rewrite | None:
    """The rewrite in force on a model."""
    found = (patch_of(model, model, name) for name in ENTRIES)
    return next((p.rewrite for p in found if p is not None and not p.off), None)
