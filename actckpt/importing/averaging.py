"""The uniform average of a run's checkpoints, in a model.

References:
    Izmailov and others, Averaging weights leads to wider optima and better generalization, 2018.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from actckpt.checkpoint.discovery import Checkpoint, existing
from actckpt.checkpoint.files import Files
from actckpt.errors import ArgumentError, CheckpointMismatchError
from actckpt.importing.live_tensors import kept, put_back
from actckpt.importing.loaded_weights import LoadedWeights
from actckpt.importing.loading import load_weights
from actckpt.importing.opening import opened
from actckpt.importing.source import Source


def average_weights(
    model: nn.Module,
    checkpoints: str | os.PathLike[str] | Sequence[Checkpoint | str | os.PathLike[str]],
    *,
    last: int | None = None,
    loader: Iterable[Any] | None = None,
    item: str | None = None,
    strict: bool | str = True,
) -> LoadedWeights:
    """What `load_weights` says, once the model has the mean of several checkpoints' weights.

    Means are taken in float64, tensor by tensor; what holds no floating point is the newest
    checkpoint's. After any error the model is as before.

    Args:
        checkpoints: a run's directory, for all of its checkpoints; or some, the newest first.
        last: only so many of the newest.
        loader: batches, as the model is called with them, by which the statistics of BatchNorm are
            made anew; None leaves their mean, which is not what the averaged weights would give.
        item: as for `load_weights`.
        strict: as for `load_weights`.

    Raises:
        ArgumentError: there is nothing to average.
        CheckpointError: as `load_weights`.
        CheckpointMismatchError: two of them have other names, dtypes or shapes.
    """
    if isinstance(checkpoints, str | os.PathLike):
        found: Sequence[Any] = existing(Files(), os.fspath(checkpoints)).checkpoints
    else:
        found = checkpoints
    if last is not None and (type(last) is not int or last < 1):
        raise ArgumentError(f"last must be at least 1; found {last!r}")
    mean = _Mean()
    for each in found[:last]:  # one at a time: each is as large as the training's state
        mean.add(opened(each, item))
    if not mean.count:
        raise ArgumentError("average_weights needs at least one checkpoint; found none")
    if loader is None:
        loaded = load_weights(model, mean.values(), strict=strict)
    else:
        before, live = kept(model)
        loaded = load_weights(model, mean.values(), strict=strict)
        _make_statistics(model, loader, before, live)
    return replace(loaded, source=mean.newest, kind=f"the mean of {mean.count} checkpoints")


def _make_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    before: Mapping[str, torch.Tensor],
    live: Mapping[str, torch.Tensor],
) -> None:
    """Those of BatchNorm anew; after an error in a batch the model is as it was before."""
    modes = {module: module.training for module in model.modules()}
    # update_bn takes it away, and gives it back only at its end
    momenta = {m: m.momentum for m in modes if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    try:
        update_bn(loader, model)
    except BaseException:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
        put_back(before, live)
        raise


class _Mean:
    """Of the tensors of several sources, the newest first."""

    def __init__(self) -> None:
        self.count = 0
        self.newest = ""
        self._described: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, source: Source) -> None:
        """One more."""
        described = {name: str(stored) for name, stored in source.tensors.items()}
        if not self.count:
            self.newest, self._described = source.where, described
        elif described != self._described:
            names = described.keys() | self._described.keys()
            name = min(n for n in names if described.get(n) != self._described.get(n))
            raise CheckpointMismatchError(
                f"{source.where} has {name} as {described.get(name)}, {self.newest} as "
                f"{self._described.get(name)}: only checkpoints of one model have a mean"
            )
        for name, stored in source.tensors.items():
            if not self.count:
                self._dtypes[name] = stored.dtype
                self._sums[name] = _wide(stored.read())
            elif _has_mean(stored.dtype):
                self._sums[name] += stored.read()
        self.count += 1

    def values(self) -> dict[str, torch.Tensor]:
        """The means, in the dtypes of the checkpoints."""
        return {
            name: (total / self.count if _has_mean(dtype) else total).to(dtype)
            for (name, total), dtype in zip(self._sums.items(), self._dtypes.values(), strict=True)
        }


def _has_mean(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _wide(x: torch.Tensor) -> torch.Tensor:
    if x.dtype.is_complex:
        return x.to(torch.complex128)
    return x.to(torch.float64) if x.dtype.is_floating_point else x
