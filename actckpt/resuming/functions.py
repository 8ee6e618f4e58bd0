"""Functions that no checkpoint holds, such as that of a schedule: told apart, with what they keep.

A schedule's function, or that of an average, is the code's own after a resume. What it does depends
on its code, on what it closes over, and on the globals that it names; of all that, a checkpoint has
what tells whether it is the same.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from actckpt.resuming.reachable import is_of_a_library
from actckpt.resuming.settings import schedule_of

# values are compared as text; a longer one as its hash
_LONGEST = 200
# of a value, and of functions that a function names
_DEEPEST = 3
# entries of a value that are looked at
_MOST = 64
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def functions_item(objects: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the functions of these objects from others, as an item of a checkpoint."""
    return {path: _seen(f, state=not saved) for path, f, saved in _functions(objects)}


def other_functions(objects: Mapping[str, Any], item: Mapping[str, Any] | None) -> list[str]:
    """How the functions are others than those that were saved, or keep something else.

    Args:
        item: None is of a version that did not look.
    """
    found = []
    for path, mine in functions_item(objects).items():
        theirs = (item or {}).get(path)
        if theirs is None:
            if item is not None:
                found.append(f"{path} is a function, and was none")
            continue
        here, saved = mine["values"], theirs["values"]
        changed = [k for k in {**saved, **here} if here.get(k) != saved.get(k)]
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            found.append(
                f"{path} is a function, which no checkpoint holds: its {key} was "
                f"{saved.get(key, 'not there'):.40}, is {here.get(key, 'not there'):.40}{more}"
            )
        elif mine["python"] == theirs["python"] and mine["code"] != theirs["code"]:
            found.append(
                f"{path} is a function, which no checkpoint holds, and another than it was"
            )
    return found


def _functions(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """(path, function, whether what it keeps is in its owner's state) of schedules and averages."""
    for name, x in objects.items():
        schedule = schedule_of(x)
        if schedule is not None:
            yield from _of_schedule(name, schedule)
        for key in ("avg_fn", "multi_avg_fn"):
            if callable(f := getattr(x, key, None)):
                yield f"{name}.{key}", f, False


def _of_schedule(name: str, schedule: Any) -> Iterator[tuple[str, Any, bool]]:
    for key, value in vars(schedule).items():
        parts = value if isinstance(value, list) else [value]
        for number, part in enumerate(parts):
            path = f"{name}.{key}[{number}]" if isinstance(value, list) else f"{name}.{key}"
            if isinstance(part, torch.optim.lr_scheduler.LRScheduler):
                yield from _of_schedule(path, part)
            elif callable(part) and not isinstance(part, type) and key != "optimizer":
                plain = isinstance(part, _FUNCTIONS)
                # torch saves the attributes of an object that is called
                yield path, part, not plain


def _seen(f: Any, *, state: bool) -> dict[str, Any]:
    values: dict[str, str] = {}
    code = _look(f, "", values, 0, state=state)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"code": _hash(code), "python": version, "values": values}


def _look(f: Any, prefix: str, values: dict[str, str], depth: int, *, state: bool = True) -> str:
    """What its code is; notes the values that it depends on."""
    if depth > _DEEPEST:
        return ""
    if isinstance(f, functools.partial):
        for number, value in enumerate(f.args):
            _note(values, depth, f"{prefix}args[{number}]", value, ())
        for key, value in f.keywords.items():
            _note(values, depth, f"{prefix}{key}", value, ())
        return "partial " + _look(f.func, prefix, values, depth + 1)
    if isinstance(f, types.BuiltinFunctionType):
        return f.__qualname__
    function, owner = f, None
    if isinstance(f, types.MethodType):
        function, owner = f.__func__, f.__self__
    elif not isinstance(f, types.FunctionType):
        function, owner = getattr(type(f).__call__, "__func__", type(f).__call__), f
    if not isinstance(function, types.FunctionType):
        return type(f).__qualname__
    if owner is not None and state:
        _note(values, depth, f"{prefix}self", owner, function.__code__.co_names)
    for key, value in _kept(function):
        _note(values, depth, f"{prefix}{key}", value, function.__code__.co_names)
    return _code(function.__code__)


def _kept(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, its defaults, and the globals that it names."""
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((f"default[{n}]", d) for n, d in enumerate(f.__defaults__ or ()))
    yield from (f.__kwdefaults__ or {}).items()
    if not is_of_a_library(f.__code__):
        names = (n for n in f.__code__.co_names if n in f.__globals__)
        yield from ((n, f.__globals__[n]) for n in names)


def _note(
    values: dict[str, str], depth: int, name: str, value: Any, attributes: Sequence[str]
) -> None:
    """Notes a value by its name; of an object, those attributes that the function names."""
    if isinstance(value, _FUNCTIONS):
        values[name] = _hash(_look(value, f"{name}.", values, depth + 1))
        return
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and not isinstance(value, type | types.ModuleType):
        parts = {f"{name}.{key}": held[key] for key in attributes if key in held}
    else:
        parts = {name: value}
    for key, part in parts.items():
        text = _text(part, depth)
        if text:
            values[key] = text if len(text) <= _LONGEST else _hash(text)


def _text(x: Any, depth: int) -> str:
    """A value as text that is the same in every process; "" where there is none."""
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(x)
    if isinstance(x, torch.Tensor):
        return repr(x.tolist()) if type(x) is torch.Tensor and x.numel() <= _MOST else ""
    if isinstance(x, np.ndarray | np.generic):
        return repr(x.tolist()) if x.size <= _MOST else ""
    if depth > _DEEPEST or not isinstance(x, Mapping | list | tuple | set | frozenset):
        return ""
    if len(x) > _MOST:
        return f"{len(x)} entries"
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{k!r}: {_text(v, depth + 1)}' for k, v in x.items())}}}"
    texts = [_text(v, depth + 1) for v in x]
    return f"[{', '.join(texts if isinstance(x, list | tuple) else sorted(texts))}]"


def _code(code: types.CodeType) -> str:
    """What a function does, wherever it stands."""
    constants = [_constant(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names} {code.co_varnames}"


def _constant(x: Any) -> str:
    if isinstance(x, types.CodeType):
        return _code(x)
    # in every process in the same order
    return repr(sorted(map(repr, x))) if isinstance(x, frozenset) else repr(x)


def _hash(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
