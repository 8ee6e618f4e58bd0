"""Parameters of classes of their own (k-bit ones), and the objects that modules keep beside them.

Quantized layers keep what their weight means (scales, a code book, its shape) in attributes of the
parameter or of an object, and look at the parameter's class.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_Fake = Callable[[torch.Tensor], torch.Tensor]
_NO_STATE = (nn.Module, torch.Tensor, type, types.ModuleType, enum.Enum, torch.Generator)


def dressed(fake: torch.Tensor, real: torch.Tensor, of: _Fake) -> torch.Tensor:
    """``fake`` with the class and the attributes of the parameter ``real``, if those are its own.

    Args:
        of: tensor -> its fake, for attributes.
    """
    if not _has_own_class(real):
        return fake
    fake.__class__ = _fake_class(type(real))
    for name, value in real.__dict__.items():
        if name not in fake.__dict__:
            fake.__dict__[name] = of(value) if isinstance(value, torch.Tensor) else value
    return fake


@contextmanager
def made_of_fakes() -> Iterator[None]:
    """Fakes can be made parameters of a class of its own, as its constructor does with tensors."""
    original = torch.Tensor._make_subclass

    def make(cls: Any, data: torch.Tensor, require_grad: bool = False, **more: Any) -> Any:
        if not isinstance(data, FakeTensor) or not _is_own_class(cls):
            return original(cls, data, require_grad, **more)
        made = data.detach()
        made.__class__ = _fake_class(cls)
        return made.requires_grad_(require_grad)

    tensor: Any = torch.Tensor
    tensor._make_subclass = staticmethod(make)
    try:
        yield
    finally:
        del tensor._make_subclass  # what it inherits is found again


def _has_own_class(t: torch.Tensor) -> bool:
    """Whether a parameter is of a class that only code outside of torch asks for."""
    return (
        _is_own_class(type(t))
        and not nn.parameter.is_lazy(t)
        and not is_traceable_wrapper_subclass(t)
    )


def _is_own_class(kind: Any) -> bool:
    return (
        kind is not nn.Parameter
        and issubclass(kind, nn.Parameter)
        and not issubclass(kind, FakeTensor)
        and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


@cache
def _fake_class(kind: type) -> type:
    return type(kind.__name__, (FakeTensor, kind), {"__module__": kind.__module__})


@contextmanager
def objects_faked(modules: Iterable[nn.Module], of: _Fake) -> Iterator[list[torch.Tensor]]:
    """Tensors in the objects that modules and parameters hold are fake; on exit all is as it was.

    Yields:
        the fakes, of attributes of parameters too: what exists beside parameters and buffers.
    """
    found: dict[int, Any] = {}
    fakes: list[torch.Tensor] = []
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for value in module.__dict__.values():
            _gather(value, found)
        for p in module._parameters.values():
            if p is not None and _has_own_class(p):
                for value in p.__dict__.values():
                    _gather(value, found)
                    if isinstance(value, torch.Tensor):  # `dressed` hands it over
                        fakes.append(of(value))
    kept = [(x, dict(vars(x))) for x in found.values()]
    try:
        for x, attributes in kept:
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                    vars(x)[name] = of(value)
                    fakes.append(of(value))
        yield fakes
    finally:
        for x, attributes in kept:
            now = vars(x)
            same = now.keys() == attributes.keys()
            if not same or any(now[name] is not value for name, value in attributes.items()):
                now.clear()
                now.update(attributes)


def _gather(x: Any, found: dict[int, Any]) -> None:
    """Enters an object with state, and those inside that hold tensors."""
    if id(x) in found or not _has_state(x):
        return
    found[id(x)] = x
    for value in list(vars(x).values()):
        if _has_state(value) and any(isinstance(v, torch.Tensor) for v in vars(value).values()):
            _gather(value, found)


def _has_state(x: Any) -> bool:
    if isinstance(x, _NO_STATE) or callable(x) or not isinstance(getattr(x, "__dict__", 0), dict):
        return False
    return type(x).__module__.partition(".")[0] not in sys.stdlib_module_names
