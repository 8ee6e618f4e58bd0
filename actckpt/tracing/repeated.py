"""Operations on fakes of shapes that came before: their results are made again without a kernel.

Torch's own cache of fake results does the same for fewer operations, and takes most of its time
for the key. A step on fakes is little else than such operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from actckpt.tracing.new_fakes import NewFakes
from actckpt.tracing.signature import encode

aten = torch.ops.aten
Key = tuple[Any, ...]

# arguments that are what they are: equal ones of one type give equal results
_CONSTANTS = frozenset(
    {int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
)
# results that depend on values, or change how an argument lies
_OTHERWISE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
# what it has the tag for are masks, which raise
_BY_SHAPE = {aten.index.Tensor}
# fakes of constants, with their values
_LIFTS = {aten.lift.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}
# entries of one process: far more than the steps of a few models have
_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class _Fresh:
    """A tensor on a storage of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, fakes: NewFakes, args: tuple[Any, ...]) -> torch.Tensor:
        return fakes.fresh(self.shape, self.stride, self.dtype, self.device)


@dataclass(frozen=True, slots=True)
class _Window:
    """A tensor on the storage of the argument at ``position``."""

    position: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    def make(self, fakes: NewFakes, args: tuple[Any, ...]) -> torch.Tensor:
        storage = args[self.position].untyped_storage()
        return fakes.window(storage, self.shape, self.stride, self.offset, self.dtype, self.device)


@dataclass(frozen=True, slots=True)
class _Argument:
    """The argument at ``position`` itself, which was written into."""

    position: int

    def make(self, fakes: NewFakes, args: tuple[Any, ...]) -> Any:
        return args[self.position]


@dataclass(frozen=True, slots=True)
class _Nothing:
    """None: a gradient that was not asked for."""

    def make(self, fakes: NewFakes, args: tuple[Any, ...]) -> None:
        return None


_Made = _Fresh | _Window | _Argument | _Nothing


@dataclass(slots=True)
class _Entry:
    """What an operation returned: one result, or several in a tuple or list."""

    results: tuple[_Made, ...]
    kind: type | None
    signature: str = ""


class Repeated:
    """What operations on fakes gave, by operation, shapes and constants."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}

    def key(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], accelerated: bool
    ) -> Key | None:
        """What the results depend on; None where that is more than shapes and constants."""
        # there, views of normal tensors are normal ones, and new tensors are not
        if not _is_by_shape(func) or torch.is_inference_mode_enabled():
            return None
        parts: list[Any] = [func, accelerated, torch.get_default_dtype()]
        if not _described(args, parts):
            return None
        for name, value in kwargs.items():
            parts.append(name)
            if not _described((value,), parts):
                return None
        return tuple(parts)

    def results(self, key: Key, fakes: NewFakes, args: tuple[Any, ...]) -> tuple[bool, Any]:
        """Whether the operation was met before, and its results made anew."""
        entry = self._entries.get(key)
        if entry is None:
            return False, None
        with torch._C.DisableTorchFunction():  # modes of those see what a script's operations do
            made = [result.make(fakes, args) for result in entry.results]
        return True, made[0] if entry.kind is None else entry.kind(made)

    def learn(self, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Takes down what an operation has returned, if it can be made again from the key."""
        several = type(out) in (list, tuple)
        if self.key(key[0], args, kwargs, key[1]) != key:
            return  # an argument lies otherwise than before
        outputs = out if several else (out,)
        results = [_made(o, (*args, *kwargs.values())) for o in outputs]
        found = [r for r in results if r is not None]
        if len(found) < len(results) or _share(outputs, found):
            return
        if any(getattr(r, "position", 0) >= len(args) for r in found):
            return  # a keyword's
        if len(self._entries) >= _MOST:
            self._entries.clear()
        self._entries[key] = _Entry(tuple(found), type(out) if several else None)

    def signature(
        self, key: Key | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str:
        """The line by which the profile knows the operation: `signature.encode`."""
        entry = self._entries.get(key) if key is not None else None
        if entry is None:
            return encode(str(func), args, kwargs)
        if not entry.signature:
            entry.signature = encode(str(func), args, kwargs)
        return entry.signature


REPEATED = Repeated()


@cache
def _is_by_shape(func: Any) -> bool:
    """Whether an operation's results depend on shapes and constants alone."""
    if func.namespace != "aten" or func in _LIFTS:
        return False
    return func in _BY_SHAPE or not any(tag in func.tags for tag in _OTHERWISE)


def _described(values: Iterable[Any], parts: list[Any]) -> bool:
    """Adds what describes some arguments; False where something else counts, too."""
    for x in values:
        kind = type(x)
        if kind is FakeTensor:
            dtype = x.dtype
            if (
                x.constant is not None
                or x.layout is not torch.strided
                or dtype.is_complex
                or x.is_neg()
            ):
                return False
            parts += (x.shape, x.stride(), x.storage_offset(), dtype, x.fake_device)
        elif x is None:
            parts.append(None)
        elif kind is float:
            # 0.0 and -0.0 are equal, and no such constants; no NaN equals itself
            parts += (kind, x.hex())
        elif kind in _CONSTANTS:
            # 1, 1.0 and True are equal, and promote otherwise
            parts += (kind, x)
        elif kind is list or kind is tuple:
            parts += (kind, len(x))
            if not _described(x, parts):
                return False
        else:
            return False
    return True


def _made(out: Any, args: tuple[Any, ...]) -> _Made | None:
    """How a result came to be; None where the key does not say."""
    if out is None:
        return _Nothing()
    if type(out) is not FakeTensor:
        return None
    same = [n for n, a in enumerate(args) if a is out]
    if same:
        return _Argument(0) if same == [0] else None
    if out.requires_grad or not _described((out,), []):
        return None
    lies: Any = (tuple(out.shape), out.stride(), out.storage_offset(), out.dtype, out.fake_device)
    storage = out.untyped_storage()
    bases = [n for n, a in enumerate(args) if _lies_on(a, storage)]
    if bases:
        single = len(bases) == 1 and isinstance(args[bases[0]], torch.Tensor)
        return _Window(bases[0], *lies) if single else None
    last = 1 + sum((n - 1) * step for n, step in zip(lies[0], lies[1], strict=True))
    size = last * out.dtype.itemsize if out.numel() else 0
    if lies[2] or storage.nbytes() != size:
        return None
    return _Fresh(lies[0], lies[1], lies[3], lies[4])


def _lies_on(x: Any, storage: torch.UntypedStorage) -> bool:
    """Whether an argument, or one in a list of them, lies on a storage."""
    if isinstance(x, (list, tuple)):
        return any(_lies_on(i, storage) for i in x)
    return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage._cdata


def _share(outputs: Iterable[Any], results: list[_Made]) -> bool:
    """Whether new results lie on one storage."""
    fresh_ones = [
        o.untyped_storage()._cdata
        for o, result in zip(outputs, results, strict=True)
        if isinstance(result, _Fresh)
    ]
    return len(set(fresh_ones)) < len(fresh_ones)
