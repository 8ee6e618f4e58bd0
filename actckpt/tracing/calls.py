"""Which torch functions a forward calls, in order: what a run is followed by, call by call.

A call of torch's Python interface (``x.view(2, 3)``, ``F.linear(x, w)``) always runs the same
operations when its name, its arguments and what they are made of are the same. So a run that makes
the traced calls on the traced tensors is the traced run, whatever Python did in between.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from actckpt.data.graph import FunctionCall
from actckpt.tracing.call import tensors
from actckpt.tracing.mode import SKIPPED
from actckpt.tracing.recorder import Recorder
from actckpt.tracing.signature import described
from actckpt.tracing.transforms import in_transform

# reads of ``x.shape`` and the like: method-wrappers, which no other kind of call is
GETTER = types.MethodWrapperType
# those that make a tensor, and are followed as ``x.t()`` is
_MAKERS = frozenset({"T", "H", "mT", "mH", "real", "imag", "data"})
# questions that run no operation
_QUESTIONS = (
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_set_to", "data_ptr",
    "get_device", "__len__", "__hash__", "__repr__", "untyped_storage", "register_hook",
    "has_names", "is_conj", "is_neg", "is_inference", "is_shared", "is_pinned", "__format__",
    "register_post_accumulate_grad_hook",
)  # fmt: skip
QUESTIONS = frozenset(
    getattr(torch.Tensor, name) for name in _QUESTIONS if hasattr(torch.Tensor, name)
) | {torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel, *SKIPPED}


def is_question(func: Any) -> bool:
    """Whether a call only asks about a tensor: not followed."""
    if type(func) is GETTER:
        of: Any = func.__self__
        return func.__name__ == "__get__" and of.__name__ not in _MAKERS
    # the latter is what fake tensors ask each other
    return func in QUESTIONS or getattr(func, "namespace", "") in ("prim", "profiler")


def name_of(func: Any) -> str:
    """The name under which a call is known: its public one where it has one."""
    name: str | None = resolve_name(func)
    return name or f"{getattr(func, '__module__', '')}.{getattr(func, '__qualname__', repr(func))}"


def described_call(func: Any, args: Any, kwargs: Any) -> str:
    """A call's name and arguments, and the autocast that it is made under, if any."""
    return described(name_of(func), args, kwargs) + casting()


def casting() -> str:
    """What autocast makes of a call, "" where none is enabled.

    No torch function is called to enter it, so it is looked at with every call.
    """
    if not torch._C._is_any_autocast_enabled():
        return ""
    return " ".join(
        f"{device} {torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda", "xpu", "mps")
        if torch.is_autocast_enabled(device)
    )


def resident_tables(model: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries in which modules keep parameters and buffers, in the order of wires."""
    modules = list(model.modules())
    return [t for m in modules for t in (m._parameters, m._buffers) if t]


def residents(tables: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What is in them now."""
    return [t for table in tables for t in table.values() if t is not None]


class CallRecorder(TorchFunctionMode):
    """Writes down the calls of a root's forward while it is traced.

    Every tensor that a call returns gets the next *wire*; before them come the wires of the
    model's parameters and buffers and of the tensors in its arguments.
    """

    def __init__(self, recorder: Recorder, model: nn.Module, arguments: Any) -> None:
        super().__init__()
        self.recorder = recorder
        self.calls: list[FunctionCall] = []
        self.wires = 0
        self._wire: dict[int, tuple[Callable[[], Any], int]] = {}
        for t in (*residents(resident_tables(model)), *tensors(arguments)):
            self._enter(t)

    def _enter(self, t: torch.Tensor) -> None:
        self._wire[id(t)] = (weakref.ref(t), self.wires)
        self.wires += 1

    def _found(self, t: torch.Tensor) -> int:
        ref, wire = self._wire.get(id(t), (lambda: None, -1))
        return wire if ref() is t else -1

    def __torch_function__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if is_question(func) or not recorder.recording or recorder.paused or in_transform():
            return func(*args, **kwargs)
        given = leaves((args, kwargs))
        sources = tuple(self._found(t) for t in given)
        inputs = self._values(given)
        text = self._quietly(lambda: described_call(func, args, kwargs))
        first, save = len(recorder.ops), len(recorder.saves)
        number = len(self.calls)
        begun = FunctionCall(text, sources, inputs, (), self.wires, first, first, save, save)
        self.calls.append(begun)
        out = func(*args, **kwargs)
        made = leaves(out)
        self.calls[number] = replace(
            begun,
            outputs=self._values(made),
            last=len(recorder.ops),
            last_save=len(recorder.saves),
        )
        for t in made:
            self._enter(t)
        return out

    def _values(self, found: list[torch.Tensor]) -> tuple[int, ...]:
        values: tuple[int, ...] = self._quietly(
            lambda: tuple(self.recorder.seen_value(t) for t in found)
        )
        return values

    def _quietly(self, ask: Callable[[], Any]) -> Any:
        self.recorder.paused = True
        try:
            return ask()
        finally:
            self.recorder.paused = False


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples, dicts and slices, in order; nothing else is opened."""
    found: list[torch.Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _gather(item, found)
    elif type(tree) is dict:
        for item in tree.values():
            _gather(item, found)
    elif isinstance(tree, slice):
        _gather((tree.start, tree.stop, tree.step), found)
