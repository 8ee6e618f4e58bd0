"""What a LightningModule has logged in an epoch that goes on: sums of `self.log`, torchmetrics."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torchmetrics import Metric

# of a logged value, as `self.log` was given it
_GIVEN = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def gather_results(results: _ResultCollection, module: pl.LightningModule) -> list[Any]:
    """Of each value that was logged, what it was logged as and what it has come to."""
    return [[key, _of_result(metric)] for key, metric in results.items()]


def _of_result(metric: _ResultMetric) -> dict[str, Any]:
    meta = metric.meta
    found: dict[str, Any] = {
        "given": {name: getattr(meta, name) for name in _GIVEN},
        "reduce": meta.reduce_fx.__name__,
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "updates": metric._update_count,
        "last": metric._forward_cache,
        "computed": metric._computed,
    }
    if metric.is_tensor:
        found["value"] = metric.value
        found["weight"] = getattr(metric, "cumulated_batch_size", None)
    return found


def put_results(
    results: _ResultCollection, saved: list[Any], module: pl.LightningModule, trainer: pl.Trainer
) -> None:
    """Makes the values that were logged before, as `self.log` would find them."""
    results.clear()
    for key, one in saved:
        meta = _Metadata(reduce_fx=getattr(torch, one["reduce"]), **one["given"])
        should, rank_zero_only = one["sync"]
        meta.sync = _Sync(_should=should, fn=trainer.strategy.reduce, rank_zero_only=rank_zero_only)
        metric = results[key] = _ResultMetric(meta, one["is_tensor"])
        if one["is_tensor"]:
            metric.value = one["value"].to(module.device)
            if one["weight"] is not None:
                metric.cumulated_batch_size = _moved(one["weight"], module.device)
        else:
            metric.value = module.get_submodule(meta.metric_attribute)
        metric.has_reset = one["has_reset"]
        metric._update_count = one["updates"]
        metric._forward_cache = _moved(one["last"], module.device)
        metric._computed = _moved(one["computed"], module.device)


def gather_metrics(module: pl.LightningModule) -> dict[str, Any]:
    """The states of the torchmetrics in a module, which are in no state dict."""
    return {
        path: {
            "states": {name: getattr(metric, name) for name in metric._defaults},
            "updates": metric._update_count,
            "last": metric._forward_cache,
        }
        for path, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def put_metrics(module: pl.LightningModule, saved: dict[str, Any]) -> None:
    """Puts back what `gather_metrics` found."""
    for path, metric in module.named_modules():
        if not isinstance(metric, Metric) or path not in saved:
            continue
        for name, value in saved[path]["states"].items():
            setattr(metric, name, _moved(value, metric.device))
        metric._update_count = saved[path]["updates"]
        metric._forward_cache = _moved(saved[path]["last"], metric.device)
        metric._computed = None


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_moved(x, device) for x in value] if isinstance(value, list) else value
