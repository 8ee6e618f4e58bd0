"""Optimizers from outside: what is inside of one, and copies that step fake parameters."""

from __future__ import annotations

import enum
import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from actckpt.object_walk import slots, walk

_LISTS = (list, deque, set, frozenset)
# what an optimizer may hold and does not step: functions, files, samples, and whoever holds it
_NEVER_OPENED = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, weakref.ref, enum.Enum,
    str, bytes, bool, int, float, complex, torch.Generator, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, torch.jit.ScriptModule, torch.utils.data.Dataset,
    torch.utils.data.DataLoader, torch.utils.data.Sampler,
)  # fmt: skip
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_ABSENT = object()


def is_optimizer(x: object) -> bool:
    """Whether something steps parameters: torch's kind, or a wrapper that is none of torch's."""
    if isinstance(x, (type, nn.Module)):
        return False
    return isinstance(x, Optimizer) or (
        callable(getattr(type(x), "step", None))
        and isinstance(getattr(x, "param_groups", None), list)
    )


def inside(roots: Iterable[object], shared: Iterable[nn.Module] = ()) -> Iterator[object]:
    """Everything that these hold, themselves included, each once: tensors and what can be opened.

    Args:
        shared: modules that are not opened.
    """

    def parts(x: object) -> list[object]:
        return [] if isinstance(x, torch.Tensor) else list(filter(_leads_on, _parts(x)))

    return walk(filter(_leads_on, roots), parts, seen=shared)


def _leads_on(x: object) -> bool:
    return x is not None and not isinstance(x, _NEVER_OPENED)


def _parts(x: Any) -> Iterator[Any]:
    if isinstance(x, Mapping):
        yield from x.keys()
        yield from x.values()
    elif isinstance(x, (tuple, *_LISTS)):
        yield from x
    elif isinstance(x, types.MethodType):
        yield x.__self__
    elif isinstance(x, functools.partial):
        yield from (x.args, x.keywords)
    elif _is_opened(x):
        yield from (getattr(x, name, None) for name in slots(type(x)))
    if _is_opened(x):
        yield from vars(x).values() if hasattr(x, "__dict__") else ()


def _is_opened(x: object) -> bool:
    """Whether attributes are looked at: not those of Python's own kinds (loggers, locks)."""
    package = type(x).__module__.partition(".")[0]
    return package == "collections" or package not in sys.stdlib_module_names


@contextmanager
def kept_as_they_are(roots: Iterable[object], shared: Iterable[nn.Module]) -> Iterator[None]:
    """Attributes and containers inside these are on exit as they were, whoever changed them.

    A copy that a function's closure leads back to its original steps that one.
    """
    found: list[Any] = [x for x in inside(roots, shared) if not isinstance(x, torch.Tensor)]
    kept = [(x, _contents(x), _attributes(x)) for x in found]
    try:
        yield
    finally:
        for x, contents, attributes in kept:
            if attributes is not None and not _same(vars(x), attributes):
                vars(x).clear()
                vars(x).update(attributes)
            if contents is not None and not _same(x, contents):
                x.clear()
                x.update(contents) if isinstance(x, (dict, set)) else x.extend(contents)


def _contents(x: Any) -> Any:
    if isinstance(x, dict):
        return dict(x)
    return list(x) if isinstance(x, (list, deque, set)) else None


def _attributes(x: Any) -> dict[str, Any] | None:
    return dict(vars(x)) if _is_opened(x) and isinstance(getattr(x, "__dict__", 0), dict) else None


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(before.get(k, _ABSENT) is v for k, v in now.items())
    if isinstance(now, set):
        return bool(now == set(before))
    return all(a is b for a, b in zip(now, before, strict=True))


@contextmanager
def without_hooks() -> Iterator[None]:
    """What others hung on the steps of all optimizers is not called."""
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    tables = [t for t in (getattr(torch_optimizer, n, None) for n in names) if t is not None]
    hooks = [dict(t) for t in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, found in zip(tables, hooks, strict=True):
            table.update(found)


class Copier:
    """Copies optimizers so that a copy steps the fake parameters and changes no original.

    Not by `copy.deepcopy`: that asks classes how to be copied, and some do more than that (torch's
    own write defaults into the groups), and it copies the memory of tensors that nobody foresaw.
    Attributes are put into the copy's ``__dict__``, past every property and its setter.
    """

    def __init__(
        self,
        fake: Callable[[torch.Tensor], torch.Tensor],
        shared: Iterable[nn.Module],
        *,
        elsewhere: bool,
    ) -> None:
        """
        Args:
            fake: a tensor -> its fake.
            shared: modules that copies share with their originals: the model's, fake already.
            elsewhere: the step is traced for an accelerator that is not here.
        """
        self.fake = fake
        self.elsewhere = elsewhere
        # the original is kept, so that its id is not reused
        self._copies: dict[int, tuple[Any, Any]] = {id(m): (m, m) for m in shared}
        self._new: list[Any] = []

    def copy(self, optimizer: Any) -> Any:
        """The copy; wrappers and what they wrap are copied together."""
        made = self._of(optimizer)
        for clone in self._new:
            if is_optimizer(clone):
                self._prepare(clone)
        self._new.clear()
        return made

    def _prepare(self, clone: Any) -> None:
        attributes = vars(clone)
        attributes.pop("step", None)  # a scheduler's wrapper is bound to the original
        for name in _HOOKS:
            if name in attributes:
                attributes[name] = OrderedDict()
        for group in clone.param_groups:
            # torch picks foreach by the type of the parameters, which fakes do not have
            on_gpu = self.elsewhere or all(p.is_cuda for p in group["params"])
            if on_gpu and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True

    def _of(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.fake(x)
        if x is None or isinstance(x, _NEVER_OPENED):
            return x
        known = self._copies.get(id(x))
        if known is not None:
            return known[1]
        if isinstance(x, (tuple, frozenset)):
            items = [self._of(i) for i in x]
            made = x._make(items) if hasattr(x, "_make") else type(x)(items)
            return self._note(x, made)
        if isinstance(x, types.MethodType):
            return types.MethodType(x.__func__, self._of(x.__self__))
        if isinstance(x, functools.partial):
            keywords = {k: self._of(v) for k, v in x.keywords.items()}
            return functools.partial(x.func, *(self._of(a) for a in x.args), **keywords)
        return self._filled(x)

    def _note(self, x: Any, made: Any) -> Any:
        self._copies[id(x)] = (x, made)
        return made

    def _filled(self, x: Any) -> Any:
        """A list, a dictionary or an object: it may hold itself."""
        made = self._note(x, _blank(x))
        if made is x:
            return x
        self._new.append(made)
        if isinstance(x, dict):
            for key, value in x.items():
                dict.__setitem__(made, self._of(key), self._of(value))
        elif isinstance(x, set):
            made.update(self._of(i) for i in x)
        elif isinstance(x, (list, deque)):
            made.extend(self._of(i) for i in x)
        for name in slots(type(x)) if _is_opened(x) else ():
            if hasattr(x, name):
                object.__setattr__(made, name, self._of(getattr(x, name)))
        for name, value in (_attributes(x) or {}).items():
            made.__dict__[name] = self._of(value)
        return made


def _blank(x: Any) -> Any:
    """An object of the same kind with nothing in it; ``x`` itself where none can be made."""
    if isinstance(x, defaultdict):
        made = type(x).__new__(type(x))
        made.default_factory = x.default_factory
        return made
    if isinstance(x, deque):
        return type(x)(maxlen=x.maxlen)
    if not isinstance(x, (dict, list, set)) and not _is_opened(x):
        return x
    kind: Any = type(x)
    try:
        return kind.__new__(kind)
    except TypeError:
        return x
