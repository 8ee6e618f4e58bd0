"""Parameters and buffers that changed after the forward: a replay may go on, but not read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from actckpt.tracing.mode import SKIPPED, flat_tensors

Refusal = Callable[[torch.Tensor], Exception]

# what gives a tensor's memory to code that runs below torch's dispatcher
_RAW = frozenset(
    getattr(torch.Tensor, name)
    for name in ("data_ptr", "untyped_storage", "numpy", "__array__", "__dlpack__", "storage")
    if hasattr(torch.Tensor, name)
)


@contextmanager
def unread(tensors: Iterable[torch.Tensor], refusal: Refusal) -> Iterator[None]:
    """Raises a ``refusal`` as soon as an operation reads one of these tensors, and on exit again.

    An optimizer that steps inside backward changes parameters of which the rest of backward needs
    nothing: a region that is recomputed up to what is asked for may stop before them.
    """
    changed: dict[int, torch.Tensor] = {}
    for t in tensors:
        if t.layout != torch.strided or _is_wrapper(t):
            raise refusal(t)  # its memory cannot be told from another's
        changed[t.untyped_storage()._cdata] = t
    if torch._C._is_torch_function_all_disabled():
        raise refusal(next(iter(changed.values())))
    watch = _Watch(changed, refusal)
    try:
        with _Raw(watch), _Reads(watch):
            yield
    finally:
        if watch.refused is not None:  # by code that was told so, and went on
            raise watch.refused


class _Watch:
    """The changed tensors by their storage's address, and whether one was read."""

    def __init__(self, changed: dict[int, torch.Tensor], refusal: Refusal) -> None:
        self.changed = changed
        self.refusal = refusal
        self.refused: Exception | None = None

    def look(self, t: Any) -> None:
        """Refuses a tensor that lies in the memory of a changed one."""
        if not isinstance(t, torch.Tensor) or t.layout != torch.strided or _is_wrapper(t):
            return
        found = self.changed.get(t.untyped_storage()._cdata)
        if found is not None:
            self.refused = self.refusal(found)
            raise self.refused


class _Reads(TorchDispatchMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in SKIPPED and not _is_view(func):
            for t in flat_tensors((*args, *kwargs.values())):
                self.watch.look(t)
        return func(*args, **kwargs)


class _Raw(TorchFunctionMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _RAW:
            self.watch.look(args[0])
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether an operation only makes a window, whose own reader will be seen."""
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not func._schema.is_mutable


def _is_wrapper(t: torch.Tensor) -> bool:
    # not used directly, because its TypeGuard contradicts torch.Tensor's own signatures
    return bool(is_traceable_wrapper_subclass(t))
