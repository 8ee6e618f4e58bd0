"""Arguments that are neither tensors nor containers of them nor plain values."""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from actckpt.tracing.real_values import FEW, attach_real, real_of

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum, torch.dtype,
    torch.device, torch.layout, torch.memory_format, torch.Size, type, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, functools.partial, nn.Module,
)  # fmt: skip


class Opaque(StrEnum):
    """What a stage's arguments hold besides tensors and plain values."""

    NONE = "nothing opaque"
    CACHE = "a key-value cache"
    FILLED_CACHE = "a key-value cache that already holds tensors of its own layer"
    OTHER = "an object that is neither tensor, container nor plain value"


def is_cache(x: Any) -> bool:
    """Whether ``x`` is a Hugging Face cache or a layer of one (by class name, nothing imported)."""
    return any(
        c.__module__ == "transformers.cache_utils" and c.__name__ in ("Cache", "CacheLayerMixin")
        for c in type(x).__mro__
    )


def opaque_arguments(tree: Any) -> Opaque:
    """The worst kind of opaque object in a stage's arguments."""
    if isinstance(tree, (torch.Tensor, *_PLAIN)):
        return Opaque.NONE
    if is_cache(tree):
        return Opaque.CACHE
    if isinstance(tree, (list, tuple, set, frozenset)):
        items = list(tree)
    elif isinstance(tree, Mapping):
        items = list(tree.values())
    elif is_dataclass(tree):
        items = [getattr(tree, f.name, None) for f in fields(tree)]
    else:
        return Opaque.OTHER
    found = {opaque_arguments(i) for i in items}
    for kind in (Opaque.OTHER, Opaque.CACHE):
        if kind in found:
            return kind
    return Opaque.NONE


def snapshot_caches(tree: Any) -> Any:
    """``tree`` with every cache replaced by a structural copy that owns no memory.

    Tensors inside become meta tensors of the same shape: a stage may ask a cache for lengths of
    other layers, but one that reads their values fails loudly in the recomputation. A few integers
    (the width of a sliding window) are settings or counters, and copied.
    """
    if is_cache(tree):
        return _copy_cache(tree)
    if isinstance(tree, tuple):
        items = [snapshot_caches(i) for i in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, list):
        return [snapshot_caches(i) for i in tree]
    if type(tree) is dict:
        return {k: snapshot_caches(v) for k, v in tree.items()}
    return tree


def _copy_numbers(x: torch.Tensor) -> torch.Tensor:
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        copied = x.clone()
    real = real_of(x) if isinstance(x, FakeTensor) else None
    if real is not None:
        attach_real(copied, real)
    return copied


def _copy_cache(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        if x.numel() == 0:
            return x
        if x.numel() <= FEW and not (x.is_floating_point() or x.is_complex()):
            return _copy_numbers(x)
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, list):
        return [_copy_cache(i) for i in x]
    if isinstance(x, dict):
        return {k: _copy_cache(v) for k, v in x.items()}
    if is_cache(x):
        clone = copy.copy(x)
        clone.__dict__ = {k: _copy_cache(v) for k, v in x.__dict__.items()}
        return clone
    return x
