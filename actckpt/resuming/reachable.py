"""What can be reached from an object: its attributes, containers, closures, and named globals."""

from __future__ import annotations

import functools
import sysconfig
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from actckpt.object_walk import cells, names_in, slots, walk

# of a container; a list of a million file names is not looked through
_ENTRIES = 1_000
# in all; what is passed to a run reaches some thousand
MOST = 50_000

_ATOMS = {int, float, complex, bool, str, bytes, bytearray, type(None), range, slice, torch.dtype}
_ATOMIC = (
    type, torch.Tensor, torch.device, torch.Size, np.ndarray, np.generic, np.dtype,
    types.ModuleType, types.BuiltinFunctionType, weakref.ReferenceType, types.CodeType,
)  # fmt: skip
_LISTS = (list, tuple, deque)
_DICTS = (dict, OrderedDict, defaultdict, types.MappingProxyType)
_CONTAINERS = {*_LISTS, *_DICTS, set, frozenset}
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
# what a library refers to by name is its own matter, and found where an object holds it
_LIBRARIES = tuple({sysconfig.get_path(k) for k in ("stdlib", "platstdlib", "purelib", "platlib")})
# attributes whose content is tensors, or the machinery of an epoch that is under way
_SKIPPED = {
    torch.nn.Module: ("_parameters", "_buffers"),
    torch.optim.Optimizer: ("state", "param_groups"),
    torch.utils.data.DataLoader: ("_iterator",),
}


def reachable(
    roots: Mapping[str, Any], most: int = MOST, entries: int = _ENTRIES
) -> Iterator[tuple[str, Any]]:
    """(path, object) of everything that the roots lead to, each once, nearest first.

    A path is the same in every process: what a function refers to as a global is named by its
    module, everything else by the way to it.

    Args:
        most: objects to look at; it ends there.
        entries: of a container; the first ones.
    """
    kinds: set[type] = set()

    def parts(found: tuple[str, Any]) -> Iterator[tuple[str, Any]]:
        yield from (each for each in _next(*found, entries) if _leads_on(each[1]))
        kind = type(found[1])
        if kind not in kinds:
            kinds.add(kind)
            yield from (each for each in _of_class(kind) if _leads_on(each[1]))

    return walk(roots.items(), parts, of=lambda found: found[1], nearest_first=True, most=most)


def _leads_on(x: Any) -> bool:
    """Whether it can lead to anything: most of what a model holds are numbers and empty dicts."""
    kind = type(x)
    if kind in _ATOMS or (kind in _CONTAINERS and not x):
        return False
    return not isinstance(x, _ATOMIC)


def _next(path: str, x: Any, entries: int) -> Iterator[tuple[str, Any]]:
    if isinstance(x, _DICTS):
        for key, value in islice(x.items(), entries):
            yield f"{path}[{key!r:.40}]", value
    elif isinstance(x, _LISTS):
        for index, value in enumerate(islice(x, entries)):
            yield f"{path}[{index}]", value
    elif isinstance(x, set | frozenset):
        for value in islice(x, entries):
            yield f"{path}{{}}", value
    elif isinstance(x, _FUNCTIONS):
        yield from _of_function(path, x)
    if not isinstance(x, type) and not _is_ours(x):
        yield from _attributes(path, x)


def _attributes(path: str, x: Any) -> Iterator[tuple[str, Any]]:
    skipped = {name for kind, names in _SKIPPED.items() if isinstance(x, kind) for name in names}
    held = getattr(x, "__dict__", None)
    if isinstance(held, dict):
        for name, value in islice(held.items(), _ENTRIES):
            if name == "_modules" and isinstance(x, torch.nn.Module):
                yield from ((f"{path}.{n}", module) for n, module in value.items())
            elif name not in skipped:
                yield f"{path}.{name}", value
    for name in slots(type(x)):
        value = getattr(x, name, None)
        if value is not None:
            yield f"{path}.{name}", value


def _of_function(path: str, x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, functools.partial):
        yield f"{path}.func", x.func
        yield from ((f"{path}.args[{n}]", a) for n, a in enumerate(x.args))
        yield from ((f"{path}.{n}", a) for n, a in x.keywords.items())
        return
    if isinstance(x, types.MethodType):
        yield f"{path}.__self__", x.__self__
        yield path, x.__func__
        return
    yield from ((f"{path}.{name}", value) for name, _, value in cells(x))
    yield from ((f"{path}.default[{n}]", d) for n, d in enumerate(x.__defaults__ or ()))
    yield from ((f"{path}.{n}", d) for n, d in (x.__kwdefaults__ or {}).items())
    if not is_of_a_library(x.__code__):
        yield from _globals(x)


def _globals(x: types.FunctionType) -> Iterator[tuple[str, Any]]:
    names = names_in(x.__code__)
    for name in names:
        value = x.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            # a name of another file of the user's, such as ``settings.rng``
            if not (getattr(value, "__file__", None) or _LIBRARIES[0]).startswith(_LIBRARIES):
                found = (n for n in names if n in vars(value))
                yield from ((f"{value.__name__}.{n}", vars(value)[n]) for n in found)
        elif isinstance(value, type):
            yield from _of_class(value)
        elif value is not None:
            yield f"{x.__globals__.get('__name__', '')}.{name}", value


def is_of_a_library(code: types.CodeType) -> bool:
    """Whether it was installed, or is Python's own, and no file of the user's."""
    return code.co_filename.startswith(_LIBRARIES)


def _of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class holds itself, and its methods, where they are the user's."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("builtins", "torch", "typing", "abc", "actckpt"):
            continue
        for name, value in base.__dict__.items():
            held = getattr(value, "__func__", value)
            if isinstance(value, property):
                held = value.fget
            if isinstance(held, types.FunctionType):
                if is_of_a_library(held.__code__):
                    continue
            elif name.startswith("__"):
                continue
            yield f"{base.__module__}.{base.__qualname__}.{name}", held


def _is_ours(x: Any) -> bool:
    """Whether it is of the planner's: it holds traces, and draws nothing."""
    module = type(x).__module__
    return module.startswith("actckpt.") and not module.startswith("actckpt.resuming.")
