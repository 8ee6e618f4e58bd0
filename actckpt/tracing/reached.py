"""What a model's Python reaches outside of its modules, put back after it ran for us.

Hooks collect features in lists, forwards count in closures, draw from generators and log to objects
of the user's own. A step that is only traced or measured must leave none of it behind.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from actckpt.object_walk import cells, names_in, walk
from actckpt.own_generators import kind_of, put_state, source_of, state_of
from actckpt.tracing.containers import same_items

# kinds of which a plain copy holds all that there is
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
# whose objects are no place where a step leaves something: looked at no further
_FOREIGN = frozenset({"actckpt", "numpy", "torch"}) | (
    sys.stdlib_module_names - {"__main__", "collections", "types"}
)
# objects that are looked at, at most: a model's code may know all of its program
_MOST = 5_000
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


@contextmanager
def outside_restored(model: nn.Module, *functions: Callable[..., Any] | None) -> Iterator[None]:
    """Containers, closures, globals and objects that the model's code reaches are put back.

    Args:
        functions: others that run with it, such as the loss.
    """
    reached = _Reached()
    reached.look([*_callables(model), *functions])
    try:
        yield
    finally:
        reached.put_back()


def _callables(model: nn.Module) -> Iterator[Any]:
    """Everything whose code a step runs, and what modules keep that is none of their own."""
    seen: set[type] = set()
    for module in model.modules():
        # a ScriptModule's is C++'s, and its class has none to be read
        if type(module) not in seen and not isinstance(module, torch.jit.ScriptModule):
            seen.add(type(module))
            yield type(module).forward
        for name in _HOOKS:
            yield from module.__dict__.get(name, {}).values()
        for name, value in module.__dict__.items():
            if not name.startswith("_") or type(value) not in _CONTAINERS:
                yield value
    for name in _GLOBAL_HOOKS:
        yield from getattr(module_hooks, name, {}).values()


class _Reached:
    """What was found, as it was."""

    def __init__(self) -> None:
        self._contents: list[tuple[Any, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._names: list[tuple[dict[str, Any], str, Any]] = []
        self._generators: list[tuple[Any, dict[str, Any]]] = []

    def look(self, roots: Iterable[Any]) -> None:
        """Takes down everything that these lead to."""

        def parts(x: Any) -> list[Any]:
            return [part for part in self._parts(x) if _leads_on(part)]

        for _ in walk(filter(_leads_on, roots), parts, most=_MOST):
            pass

    def _parts(self, x: Any) -> Iterable[Any]:
        if kind_of(x):
            source = source_of(x)
            self._generators.append((source, state_of(source)))
            return ()
        if isinstance(x, types.FunctionType):
            return self._of_function(x)
        if isinstance(x, types.MethodType):
            return (x.__func__, x.__self__)
        if isinstance(x, functools.partial):
            return (x.func, *x.args, *x.keywords.values())
        if type(x) in _CONTAINERS:
            self._contents.append((x, list(x) if isinstance(x, deque) else x.copy()))
            return list(x.values()) if isinstance(x, dict) else list(x)
        if isinstance(x, tuple):
            return x
        if type(x).__module__.partition(".")[0] in _FOREIGN or not hasattr(x, "__dict__"):
            return ()
        own = vars(x)
        self._contents.append((own, dict(own)))
        return list(own.values())

    def _of_function(self, function: types.FunctionType) -> list[Any]:
        found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        found += vars(function).values()
        for _, cell, value in cells(function):
            self._cells.append((cell, value))
            found.append(value)
        names = function.__globals__
        if str(names.get("__name__", "")).partition(".")[0] in _FOREIGN:
            return found  # a decorator of theirs may hold a function of the user's
        for name in names_in(function.__code__):
            if name in names:
                self._names.append((names, name, names[name]))
                found.append(names[name])
        return found

    def put_back(self) -> None:
        for generator, before in self._generators:
            put_state(generator, before["state"])
        for container, before in self._contents:
            if isinstance(container, deque):
                if not same_items(list(container), before):
                    container.clear()
                    container.extend(before)
            elif not same_items(container, before):
                _refill(container, before)
        for cell, value in self._cells:
            if cell.cell_contents is not value:
                cell.cell_contents = value
        for names, name, value in self._names:
            if names.get(name) is not value:
                names[name] = value


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
        return
    container.clear()
    container.update(before)


def _leads_on(x: Any) -> bool:
    """Whether something may be found in it; what tensors and modules are is put back elsewhere."""
    atoms = (str, bytes, int, float, complex, types.ModuleType)
    return x is not None and not isinstance(x, (torch.Tensor, nn.Module, type, *atoms))
