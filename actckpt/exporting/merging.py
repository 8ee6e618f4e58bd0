"""An adapter merged into the weights it belongs to."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import nn

from actckpt.errors import WeightsExportError
from actckpt.exporting.replica import replica_of
from actckpt.exporting.source import Source, source_of_module

# what peft calls the original of a layer that it adapts, or trains a copy of
_ADAPTED = ("base_layer", "original_module")


def merged(source: Source, *, untie: bool) -> Source:
    """The source with its adapter merged; the same source where it has none.

    Args:
        untie: weights that merging parts from those they are tied to become weights of their own.

    Raises:
        WeightsExportError: there are such weights, and ``untie`` is false; or it is of a kind that
            cannot be merged.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(source.model, peft.PeftModel):
        return source
    if not hasattr(source.model, "merge_and_unload"):
        kinds = {type(config).__name__ for config in source.model.peft_config.values()}
        raise WeightsExportError(
            f"an adapter of {', '.join(sorted(kinds))} cannot be merged into its base: export "
            'format="safetensors" or "pt", which have its weights beside those of the base'
        )
    model: Any = replica_of(source, own_memory=True)
    inner: nn.Module = model.get_base_model()
    for names in _tied(inner):
        if not any(part in _ADAPTED for name in names for part in name.split(".")):
            continue
        if not untie:
            raise WeightsExportError(
                f"{' and '.join(names)} are one tensor, and the adapter changes only one of them: "
                'export format="adapter", or ask for weights of their own, untie=True'
            )
        for name in names[1:]:
            path, _, leaf = name.rpartition(".")
            own = inner.get_parameter(name)
            setattr(inner.get_submodule(path), leaf, nn.Parameter(own.detach().clone()))
        config = getattr(inner, "config", None)
        if config is not None:
            config.tie_word_embeddings = False
    try:
        made = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise WeightsExportError(
            f'peft cannot merge this adapter: {error}. Mend it, or export format="adapter"'
        ) from error
    whole = source_of_module(made, source.where)
    return dataclasses.replace(
        whole, table=dataclasses.replace(whole.table, facts=source.table.facts)
    )


def _tied(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    parameter: torch.Tensor
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
