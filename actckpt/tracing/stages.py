"""Which module call is running: every forward under a root is a stage while it is traced."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import _get_current_function_mode

from actckpt.data.graph import Input, Phase, Stage
from actckpt.errors import TraceError
from actckpt.tracing.call import tensors
from actckpt.tracing.calls import CallRecorder
from actckpt.tracing.containers import containers, same_items
from actckpt.tracing.data_dependence import of_forward, of_loss, of_rest
from actckpt.tracing.forwards import FORWARD, Replaced, wrapped
from actckpt.tracing.opaque import Opaque, opaque_arguments
from actckpt.tracing.parts import is_shell, parts
from actckpt.tracing.recorder import Recorder


class StageRecorder:
    """Patches ``forward`` of every module of a model that `faked` will restore."""

    def __init__(self, model: nn.Module, recorder: Recorder, entry: str = FORWARD) -> None:
        self.recorder = recorder
        self.stages: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.followed: CallRecorder | None = None
        # of forwards after the root's: how many are running, and which the backward ran
        self._later = 0
        self.in_backward: dict[str, None] = {}
        self._instead: list[Replaced] = []
        self._stack = recorder.stage_stack
        # an error, and the innermost stage that it came out of
        self._failed: tuple[Exception | None, int] = (None, -1)
        self._origin: dict[int, tuple[Any, tuple[int, int], int]] = {}
        recorder.refuse = self.refuse
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._patch(path, module, FORWARD if path else entry)

    def refuse(self, reason: str) -> None:
        """The innermost stage that is running may not be recomputed, nor what encloses it."""
        where = self.stages[self._stack[-1]]["path"] if self._stack else ""
        for sid in self._stack:
            stage = self.stages[sid]
            inner = sid == self._stack[-1]
            found = reason if inner else f"contains {where}, which cannot be recomputed"
            stage["refusal"] = stage["refusal"] or found

    def data_dependent(self, error: Exception) -> TraceError:
        """The error for a step that asked for a value which only a real one has."""
        found, failed = self._failed
        if found is error:
            stage = self.stages[failed]
            return of_forward(error, stage["path"], stage["kind"], self._largest())
        if self.recorder.phase in (Phase.FORWARD, Phase.LOSS):
            return of_loss(error)
        return of_rest(error, f"the {self.recorder.phase} pass")

    def _largest(self) -> str:
        """The module that has been run to its end and saves most, the outermost of several."""
        done = [s for s in self.stages if "last_save" in s and s["path"]]
        sizes = [self.recorder.saved_bytes(s["first_save"], s["last_save"]) for s in done]
        most = max(sizes, default=0)
        return done[sizes.index(most)]["path"] if most else ""

    def _patch(self, path: str, module: nn.Module, name: str) -> None:
        ours = wrapped(module, name)
        original = getattr(module, name) if ours is None else ours.passed_on

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(path, module, original, args, kwargs)

        # a Hugging Face decorator may look at the signature
        forward.__wrapped__ = original  # type: ignore[attr-defined]
        if ours is None:
            module.__dict__[name] = forward
        else:
            ours.instead = forward
            self._instead.append(ours)

    def _run(
        self, path: str, module: nn.Module, original: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if not self.recorder.recording:
            return original(*args, **kwargs)
        recorder = self.recorder
        sid = len(self.stages)
        parent = self._stack[-1] if self._stack else -1
        if parent < 0 and self.stages:
            return self._run_later(path, original, args, kwargs)
        inputs = self._inputs((args, kwargs))
        stage: dict[str, Any] = {
            "path": path,
            "call": self.calls[path],
            "kind": type(module).__name__,
            "parent": parent,
            "first": len(recorder.ops),
            "first_save": len(recorder.saves),
            "inputs": inputs,
            "outputs": (),
            "refusal": _scripted(module),
            "mutates": (),
            "first_call": self._calls_made(),
        }
        self.calls[path] += 1
        self.stages.append(stage)
        opaque = opaque_arguments((args, kwargs))
        if opaque is not Opaque.NONE and opaque is not Opaque.CACHE:
            stage["refusal"] = f"takes {opaque}, which a recomputation could see changed"
        given = [t for t in tensors((args, kwargs)) if t.layout == torch.strided]
        versions = [t._version for t in given]
        before, buffers = dict(module.__dict__), dict(module._buffers)
        contents = [c for c in containers(module) if c[0] not in _TABLES]
        generators = (random.getstate(), _numpy_state())
        self._stack.append(sid)
        try:
            with self._followed(module, parent, args, kwargs):
                out = original(*args, **kwargs)
        except Exception as error:
            if self._failed[0] is not error:
                self._failed = (error, sid)
            _note(error, path or type(module).__name__)
            raise
        finally:
            self._stack.pop()
        stage["mutates"] = tuple(
            i.storage for i, t, v in zip(inputs, given, versions, strict=False) if t._version != v
        )
        stage["touches"] = tuple(
            (path, name)
            for name in {**before, **module.__dict__}
            if name not in _TABLES and before.get(name) is not module.__dict__.get(name)
        ) + tuple((path, name) for name, b in module._buffers.items() if buffers.get(name) is not b)
        self._check_attributes(stage, before, contents)
        after = (random.getstate(), _numpy_state())
        stage["generators"] = tuple(
            name
            for name, a, b in (
                ("python", generators[0], after[0]),
                ("numpy", generators[1], after[1]),
            )
            if a != b
        )
        stage["last"] = len(recorder.ops)
        stage["last_call"] = self._calls_made()
        stage["last_save"] = len(recorder.saves)
        stage["outputs"] = self._outputs(sid, out)
        return out

    def _run_later(self, path: str, original: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a forward after the root's has ended: no stage of it."""
        backward = self.recorder.phase is Phase.BACKWARD and torch.is_grad_enabled()
        if path and backward and not self._later:
            self.in_backward[path] = None
        self._later += 1
        try:
            return original(*args, **kwargs)
        finally:
            self._later -= 1

    def _followed(
        self, module: nn.Module, parent: int, args: Any, kwargs: Any
    ) -> AbstractContextManager[Any]:
        """Around the root's forward: writes down the torch functions that it calls."""
        if parent >= 0:
            return nullcontext()
        self.followed = CallRecorder(self.recorder, module, (args, kwargs))
        return self.followed

    def _calls_made(self) -> int:
        """How many calls are written down so far; -1 where the next one would not be by itself."""
        if self.followed is None or _get_current_function_mode() is not self.followed:
            return -1
        return len(self.followed.calls)

    def _check_attributes(
        self, stage: dict[str, Any], before: dict[str, Any], contents: list[tuple[str, Any, Any]]
    ) -> None:
        """Refuses what a recomputation would do to the module's plain attributes once more."""
        reasons = [
            f"changes the {type(now).__name__} {name}, which a recomputation would do again"
            for name, now, copied in contents
            if not same_items(now, copied)
        ]
        read = {v for op in self.recorder.ops[stage["first"] :] for v in op.inputs}
        storages = {self.recorder.values[v].storage for v in read}
        reasons += [
            f"reads the tensor {name} and rebinds it; make it a buffer"
            for _, name in stage["touches"]
            if isinstance(old := before.get(name), torch.Tensor)
            and old.layout == torch.strided
            and self.recorder.known_storage(old) in storages
        ]
        if reasons:
            self._stack.append(self.stages.index(stage))
            self.refuse(reasons[0])
            self._stack.pop()

    def _inputs(self, tree: Any) -> tuple[Input, ...]:
        found, beside = [], []
        for t in tensors(tree):
            # of what others are made of only the first part has a place among the arguments
            stored = [self.recorder.storage_id(part) for part in parts(t)]
            if t.layout != torch.strided:
                beside += stored
                continue
            beside += stored[1:]
            origin = self._origin.get(id(t))
            source = None
            if origin is not None and origin[0]() is t and origin[2] == t._version:
                source = origin[1]
            found.append(Input(stored[0], t.requires_grad, source))
        return (*found, *(Input(sid, False) for sid in beside))

    def _outputs(self, sid: int, out: Any) -> tuple[int, ...]:
        values = []
        for leaf, t in enumerate(tensors(out)):
            if t.layout != torch.strided:
                continue
            if not is_shell(t):
                values.append(self.recorder.value_id(t))
            self._origin[id(t)] = (weakref.ref(t), (sid, leaf), t._version)
        return tuple(values)

    def close(self) -> None:
        """Takes off what `faked` does not see: patches of forwards that others have wrapped."""
        for ours in self._instead:
            ours.instead = None

    def finish(self) -> tuple[Stage, ...]:
        """The stages of the step, in order of their calls."""
        return tuple(Stage(**s) for s in self.stages)


def _numpy_state() -> str:
    state: Any = np.random.get_state()
    return repr((state[1].tobytes(), state[2]))


_TABLES = {"_parameters", "_buffers", "_modules", "forward"}


def _scripted(module: nn.Module) -> str:
    """Why a module that runs TorchScript is not recomputed: its executor saves what it likes."""
    for path, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            return f"contains a ScriptModule ({path or 'itself'}), which saves what it likes"
    return ""


def _note(error: BaseException, where: str) -> None:
    if not any(n.startswith("actckpt") for n in getattr(error, "__notes__", ())):
        error.add_note(f"actckpt: while tracing one training step, in {where}")
