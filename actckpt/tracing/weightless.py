"""A model built without its weights: large tensors have shapes and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# what a forward may ask the values of is kept: masks and indices, constants of a few thousand
_LARGEST_INTEGER_NUMEL = 1 << 20
_LARGEST_FLOAT_NUMEL = 1 << 12
_META = torch.device("meta")


def without_weights() -> TorchDispatchMode:
    """A mode in which tensors are made on the meta device unless they are small.

    Small ones are real, with the values that they would have: buffers of positions and masks.
    """
    return _Weightless()  # type: ignore[no-untyped-call]


class _Weightless(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(t.is_meta for t in tensors):
            args, kwargs = tree_map_only(torch.Tensor, _shape, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = _META
            return func(*args, **kwargs)
        if not tensors and any(a.name == "device" for a in func._schema.arguments):
            shape = func(*args, **{**kwargs, "device": _META})
            if isinstance(shape, torch.Tensor) and not _small(shape):
                return shape
        return func(*args, **kwargs)


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else tensor.to(_META)


def _small(tensor: torch.Tensor) -> bool:
    floating = tensor.is_floating_point() or tensor.is_complex()
    return tensor.numel() <= (_LARGEST_FLOAT_NUMEL if floating else _LARGEST_INTEGER_NUMEL)
