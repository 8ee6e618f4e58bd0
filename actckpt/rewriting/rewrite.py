"""A plan in force on a model: what its forwards and their backwards share."""

from __future__ import annotations

import logging
import weakref
from typing import Any, Protocol

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.rewriting.bursting import Decoded
from actckpt.rewriting.learned import Learned
from actckpt.rewriting.program import Program, StageProgram
from actckpt.tracing.calls import resident_tables, residents
from actckpt.tracing.fake import is_tracing
from actckpt.tracing.forwards import FORWARD

logger = logging.getLogger("actckpt")

ABSENT = object()


class Planner(Protocol):
    """Whoever decides the plan of a root; asked before every forward with gradients, told after."""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: str) -> bool:
        """Returns whether another plan is in force now."""

    def after_forward(self, output: Any) -> None: ...

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
        strided = torch.strided
        storages = [t.untyped_storage() for t in self.resident_tensors() if t.layout is strided]
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

    def begin(self) -> None:
        """A new forward pass. The first one's recomputations are compared bit by bit."""
        self._runs += 1
        if self._runs > 1:
            self.checking = False

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
