"""The cache of `torch.nn.utils.parametrize.cached`: a replay finds there what the forward found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

# (id of the module, name of the tensor), as torch has them
Entries = dict[tuple[int, str], torch.Tensor | None]
_torchs: Any = parametrize


def is_caching() -> bool:
    """Whether parametrized tensors are computed once and kept, as within ``cached()``."""
    return bool(_torchs._cache_enabled)


def cached_of(modules: list[nn.Module]) -> Entries | None:
    """What is kept for these modules, without its graph; None where nothing is to be kept."""
    if not is_caching():
        return None
    ids = {id(m) for m in modules}
    return {key: _alone(t) for key, t in _torchs._cache.items() if key[0] in ids}


def count_cached(modules: list[nn.Module]) -> int:
    """How many tensors are kept for these modules; -1 where none would be."""
    found = cached_of(modules)
    return -1 if found is None else len(found)


@contextmanager
def caching(entries: Mapping[tuple[int, str], torch.Tensor | None] | None) -> Iterator[None]:
    """As `cached_of` found it, for a while; what is computed meanwhile is not kept after."""
    before = _torchs._cache_enabled, _torchs._cache
    found = {} if entries is None else {key: _alone(t) for key, t in entries.items()}
    _torchs._cache_enabled, _torchs._cache = int(entries is not None), found
    try:
        yield
    finally:
        _torchs._cache_enabled, _torchs._cache = before


def cached_anew() -> AbstractContextManager[None]:
    """A step by itself within one ``cached()`` of several: nothing is kept of the one before."""
    return caching({}) if is_caching() else nullcontext()


@contextmanager
def cached_as(of: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Everything kept is for a while what ``of`` makes of it."""
    before = _torchs._cache
    _torchs._cache = {k: None if t is None else of(t) for k, t in before.items()}
    try:
        yield
    finally:
        _torchs._cache = before


def _alone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
