"""Forwards that we put on modules, also where others have wrapped them since.

A trainer may wrap a planned model's forward in its own (Hugging Face's does, for autocast). Then
ours is no longer what stands on the module, but is still what is called.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from actckpt.errors import PlanError

FORWARD = "forward"
# where ours is kept once only a function of it was taken
TAKEN = "_actckpt_forward"
# steps from a wrapper to what it wraps
_FAR = 200


class Replaced:
    """Stands for the forward of one module, or for what else is called in its place.

    Attributes:
        name: of the method: "forward", a LightningModule's "training_step".
        original: what stood on the module before; None for its class's method.
        off: it only passes calls on.
        instead: what is called in its place while the model is traced.
    """

    def __init__(
        self, module: nn.Module, original: Callable[..., Any] | None, name: str = FORWARD
    ) -> None:
        self._module = weakref.ref(module)
        self.original = original
        self.name = name
        self.off = False
        self.instead: Callable[..., Any] | None = None
        self.stands()

    def stands(self) -> None:
        """It is the outermost of ours on its module."""
        _OURS.setdefault(self.module, {})[self.name] = weakref.ref(self)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise PlanError("the module of this forward no longer exists")
        return module

    def passed_on(self, *args: Any, **kwargs: Any) -> Any:
        """What it does while it is off."""
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        module = self.module
        return getattr(type(module), self.name)(module, *args, **kwargs)


_OURS: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Replaced]]] = (
    weakref.WeakKeyDictionary()
)


def replaced(module: nn.Module, name: str = FORWARD) -> Replaced | None:
    """Ours on a module, or under a wrapper that stands there; None if there is none."""
    current = module.__dict__.get(name)
    if current is None or isinstance(current, Replaced):
        return current
    known = _OURS.get(module, {}).get(name)
    ours = known() if known is not None else None
    if ours is None:
        return None
    kept = any(value is ours for value in module.__dict__.values())
    return ours if kept or _leads_to(current, ours) else None


def wrapped(module: nn.Module, name: str = FORWARD) -> Replaced | None:
    """Ours on a module, if something else stands there that calls it."""
    ours = replaced(module, name)
    return None if ours is module.__dict__.get(name) else ours


@contextmanager
def bare(module: nn.Module, name: str = FORWARD) -> Iterator[None]:
    """A module with its own forward alone, without ours and without what stands round it.

    While a wrapper runs it must not be called again: a `torch.autocast` that is entered twice
    forgets what it found at first, and leaves autocast on. Nor must hooks that have changed the
    arguments change them once more.
    """
    ours, attributes = replaced(module, name), dict(module.__dict__)
    known = dict(_OURS.get(module, {}))
    if ours is not None:
        module.__dict__.pop(name)
        if ours.original is not None:
            module.__dict__[name] = ours.original
    module.__dict__["_forward_pre_hooks"] = OrderedDict()
    try:
        yield
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        _OURS[module] = known


@dataclass(frozen=True, slots=True)
class Around:
    """What stands round our forward of a module.

    Attributes:
        outside: what it is known to do to the output, None for nothing.
        unknown: the name of what may do anything to it; "" if there is no such thing.
    """

    outside: Callable[[Any], Any] | None = None
    unknown: str = ""


def around(module: nn.Module, name: str = FORWARD) -> Around:
    """What wraps our forward of a module, from the outermost on."""
    ours = wrapped(module, name)
    if ours is None:
        return Around()
    outside: Callable[[Any], Any] | None = None
    layer: Any = module.__dict__[name]
    while layer is not ours and layer is not forward_of:
        if isinstance(layer, types.MethodType):
            layer = layer.__func__
        elif isinstance(layer, functools.partial):
            layer = layer.func
        elif isinstance(layer, types.FunctionType) and _name(layer) in _TRANSPARENT:
            cells = dict(zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True))
            layer = cells[_TRANSPARENT[_name(layer)]].cell_contents
        elif _name(type(layer)) == "accelerate.utils.operations.ConvertOutputsToFp32":
            outside = sys.modules[type(layer).__module__].__dict__["convert_to_fp32"]
            layer = layer.model_forward
        else:
            return Around(outside, described(layer))
    return Around(outside)


def described(function: Any) -> str:
    """Where a callable comes from: its name is often that of what it wraps."""
    function = getattr(function, "__func__", function)
    is_named = isinstance(function, (types.FunctionType, type))
    return _name(function if is_named else type(function))


def _name(x: Any) -> str:
    """Module and name of a class, or of a function as `functools.wraps` does not change it."""
    if isinstance(x, types.FunctionType):
        return f"{x.__globals__.get('__name__')}.{x.__code__.co_qualname}"
    return f"{x.__module__}.{x.__qualname__}"


# functions that pass on what they are given and what comes back, and their variable for what is
# called
_TRANSPARENT = {
    "torch.amp.autocast_mode.autocast_decorator.<locals>.decorate_autocast": "func",
    "accelerate.utils.operations.convert_outputs_to_fp32.<locals>.forward": "model_forward",
}


def forward_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose patch was taken as a function."""
    patched = module.__dict__.get(TAKEN)
    if patched is None:
        return type(module).forward(module, *args, **kwargs)
    return patched(*args, **kwargs)


def _leads_to(wrapper: Any, ours: Replaced) -> bool:
    """Whether a callable holds ours, in whatever it was made of."""
    todo, seen = [wrapper], set[int]()
    while todo and len(seen) < _FAR:
        x = todo.pop()
        if x is ours:
            return True
        if id(x) in seen or isinstance(x, (nn.Module, type, types.ModuleType)):
            continue
        seen.add(id(x))
        todo.extend(_parts(x))
    return False


def _parts(x: Any) -> list[Any]:
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if c != _EMPTY]
        return [*cells, *x.__dict__.values(), *(x.__defaults__ or ())]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    return list(vars(x).values()) if callable(x) and hasattr(x, "__dict__") else []


_EMPTY = types.CellType()
