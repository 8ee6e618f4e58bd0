"""What is exported: the table of a model, or of an item of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.reading import read_checkpoint
from actckpt.errors import ArgumentError, CheckpointError, WeightsExportError
from actckpt.exporting.quantized_weights import Quantized, resolved
from actckpt.exporting.unwrapping import own_state, unwrapped_model, unwrapped_state
from actckpt.exporting.weights import Role, WeightTable, make_table, same_bits
from actckpt.resuming.buffers import Buffers
from actckpt.versions import versions


@dataclass(frozen=True, slots=True)
class Source:
    """A table, and the model that gives its architecture, if one is known.

    Args:
        where: what it is from, for messages.
        table: every exporter reads it.
        model: without wrappers; its own weights may be others than those of the table.
    """

    where: str
    table: WeightTable
    model: nn.Module | None


def source_of(
    files: Files,
    source: nn.Module | Checkpoint | str | os.PathLike[str],
    *,
    item: str,
    model: nn.Module | None,
    quantized: Quantized = "refuse",
) -> Source:
    """The table of a model or of a checkpoint, every byte of which is verified.

    Args:
        quantized: what becomes of weights in a few bits.

    Raises:
        ArgumentError: the source is neither, or a model was given twice.
        CheckpointError: there is no such checkpoint or item, or it is damaged.
        WeightsExportError: the weights are not those of the model, or differ where it ties them.
    """
    if isinstance(source, nn.Module):
        if model is not None:
            raise ArgumentError("model= gives a checkpoint its architecture; source is a model")
        bare = unwrapped_model(source)
        return source_of_module(bare, type(bare).__name__, quantized=quantized)
    if not isinstance(source, (Checkpoint, str, os.PathLike)):
        raise ArgumentError(
            f"source must be a model, a Checkpoint or a path of one; found {type(source).__name__}"
        )
    found, items = read_checkpoint(files, source)
    where = f"{found.path}: {item}"
    if item not in items:
        raise CheckpointError(f"{found.path} has no item {item!r}; it has {', '.join(items)}")
    saved = items[item]
    inner = None if model is None else unwrapped_model(model)
    own = {} if inner is None else own_state(inner.state_dict(), where) | _buffers(inner)
    state = unwrapped_state(saved, where, own) if isinstance(saved, Mapping) else {}
    left = list(state)
    state = resolved(state, quantized, where)
    left = [name for name in left if name not in state]
    roles = {} if inner is None else _roles(inner)
    loose = unwrapped_state(_loose(items, item), where, own)
    state |= {name: x for name, x in loose.items() if name not in state}
    roles |= dict.fromkeys(loose, "non-persistent")
    table = make_table(state, roles, where, facts=_facts(found, items), left=left)
    if inner is not None:
        _check_names(table, inner, where, quantized)
        _check_ties(table, inner, where)
    return Source(where, table, inner)


def source_of_module(model: nn.Module, where: str, *, quantized: Quantized = "refuse") -> Source:
    """The table of a model without wrappers.

    Raises:
        WeightsExportError: a tensor has no elements of its own here.
    """
    whole = own_state(model.state_dict(), where) | _buffers(model)
    state = resolved(whole, quantized, where)
    left = [name for name in whole if name not in state]
    table = make_table(state, _roles(model), where, facts={"versions": versions()}, left=left)
    return Source(where, table, model)


def _roles(model: nn.Module) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for name, _ in model.named_buffers(remove_duplicate=False):
        roles[name] = "buffer"
    roles |= dict.fromkeys(Buffers(model).state_dict(), "non-persistent")
    for name, _ in model.named_parameters(remove_duplicate=False):
        roles[name] = "parameter"
    return own_state(roles, type(model).__name__)


def _buffers(model: nn.Module) -> dict[str, Any]:
    return own_state(Buffers(model).state_dict(), type(model).__name__)


def _loose(items: Mapping[str, Any], item: str) -> Mapping[str, Any]:
    """The non-persistent buffers of an item; early versions kept none but the model's."""
    kept: Mapping[str, Any] = items["buffers"]
    if item != "model":
        kept = items.get("other-buffers", {}).get(item, {})
    return kept


def _facts(checkpoint: Checkpoint, items: Mapping[str, Any]) -> dict[str, Any]:
    plans = items["plans"] or {}
    return {
        "step": checkpoint.step,
        "tag": checkpoint.tag,
        "metrics": dict(checkpoint.metrics),
        "position": {k: items["position"][k] for k in ("epoch", "batch")},
        "budget": {k: v for k, v in plans.items() if "budget" in k},
        "versions": dict(checkpoint.manifest.versions),
        "config": dict(items["config"]),
    }


def _check_names(table: WeightTable, model: nn.Module, where: str, quantized: Quantized) -> None:
    own = resolved(own_state(model.state_dict(), where), quantized, where)
    theirs = table.persistent()
    missing = [name for name in own if name not in theirs and name not in table.left_out]
    extra = [name for name in theirs if name not in own]
    if missing or extra:
        said = [f"lacks {missing[0]}"] * bool(missing) + [f"has {extra[0]}"] * bool(extra)
        raise WeightsExportError(
            f"{where} is of another model than {type(model).__name__}: it {' and '.join(said)} "
            f"({len(missing)} lacking, {len(extra)} more). Pass model= as it was trained"
        )
    for name, x in theirs.items():
        if x.shape != own[name].shape:
            raise WeightsExportError(
                f"{where} has {name} of shape {list(x.shape)}, {type(model).__name__} of "
                f"{list(own[name].shape)}: pass model= as it was trained"
            )


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers and parameters of a model without wrappers, tied ones under each of their names."""
    tensors: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    return own_state(tensors, type(model).__name__)


def _check_ties(table: WeightTable, model: nn.Module, where: str) -> None:
    first: dict[int, str] = {}
    for name, own in tensors_of(model).items():
        weight = table.weights.get(name)
        if weight is None:
            continue
        before = first.setdefault(id(own), name)
        if not same_bits(table.weights[before].tensor, weight.tensor):
            raise WeightsExportError(
                f"{type(model).__name__} ties {before} and {name}, and {where} has different "
                "values for them, as an average of weights may: export another item, make the "
                "two equal, or leave model= out, which safetensors, pt and dcp do not need"
            )
