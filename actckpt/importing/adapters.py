"""Adapters of PEFT: which live tensor each of a file's names is, as peft itself says it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.documents import parsed
from actckpt.errors import CheckpointFormatError, CheckpointMismatchError
from actckpt.importing.source import Source

CONFIG = "adapter_config.json"
# what does not change what the weights mean
_FREE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights",
        "lora_dropout", "megatron_core", "modules_to_save", "peft_version", "revision",
        "target_modules", "task_type", "exclude_modules", "layers_pattern", "layers_to_transform",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    }
)  # fmt: skip


def adapter_config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration of the adapter in a folder; None where there is none.

    Raises:
        CheckpointFormatError: it is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    found = parsed(path.read_bytes(), str(path))
    if not isinstance(found, dict) or "peft_type" not in found:
        raise CheckpointFormatError(f"{path} is no configuration of an adapter")
    return found


def refuse_merged(model: nn.Module) -> None:
    """Raises CheckpointMismatchError where weights of a layer have an adapter's added to them."""
    merged = [name for name, x in model.named_modules() if getattr(x, "merged_adapters", None)]
    if merged:
        raise CheckpointMismatchError(
            f"adapters of the model are merged into its weights, as in {merged[0]}: what is loaded "
            "would not be what is computed with. model.unmerge_adapter() first. Nothing was changed"
        )


def adapter_tensors(
    model: nn.Module, live: Mapping[str, torch.Tensor], source: Source
) -> dict[str, str]:
    """The names that an adapter's file has for tensors of the model, and theirs in it.

    Raises:
        CheckpointMismatchError: the model has no adapter, or one of another configuration.
    """
    if not any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        raise CheckpointMismatchError(
            f"{source.where} is an adapter, and this model has none: wrap it first, "
            "peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder)). Nothing was "
            "changed"
        )
    from peft import get_peft_model_state_dict

    wrapped: Any = model
    name = wrapped.active_adapter
    if not isinstance(name, str):
        raise CheckpointMismatchError(
            f"{len(name)} adapters of the model are active at once: set_adapter chooses the one "
            f"that {source.where} is loaded into. Nothing was changed"
        )
    _check_config(wrapped.peft_config[name], source)
    own = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    windows = {_window(x): live_name for live_name, x in live.items()}
    return {key: windows[_window(x)] for key, x in own.items() if _window(x) in windows}


def _check_config(config: Any, source: Source) -> None:
    """Raises where the same weights would mean something else, at the same shapes."""
    here = _as_json(config.to_dict())
    there = source.adapter or {}
    # what a file of another version does not have is peft's default there
    default = _as_json({f.name: _default(f) for f in dataclasses.fields(config)})
    differs = [
        f"{key} was {was!r:.40}{told}, is {here[key]!r:.40}"
        for key, was, told in (
            *((key, was, "") for key, was in there.items()),
            *((k, was, " (peft's default)") for k, was in default.items() if k not in there),
        )
        if key in here and key not in _FREE and _ordered(here[key]) != _ordered(was)
    ]
    if differs:
        raise CheckpointMismatchError(
            f"{source.where} is an adapter of another configuration: {'; '.join(differs[:4])}. "
            "Build the adapter with peft's from_pretrained of that folder. Nothing was changed"
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _as_json(x: Any) -> Any:
    return json.loads(json.dumps(x, default=_plain))


def _plain(x: Any) -> Any:
    return sorted(x) if isinstance(x, set | frozenset) else str(getattr(x, "value", x))


def _ordered(x: Any) -> Any:
    return sorted(map(str, x)) if isinstance(x, list) else x


def _window(x: torch.Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
