"""The trainable part of a peft model, in peft's layout."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.errors import WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.hugging_face import write_card
from actckpt.exporting.outputs import Run, running
from actckpt.exporting.prepared import Asked, Prepared, library
from actckpt.exporting.replica import model_of, replica_of
from actckpt.exporting.safetensors_file import check_file
from actckpt.exporting.source import Source
from actckpt.exporting.weights import check_same, make_table


def prepare(source: Source, asked: Asked) -> Prepared:
    """What ``PeftModel.from_pretrained(base, folder)`` makes the same model of.

    Raises:
        WeightsExportError: it is no model of peft's, one of learned prompts, or peft is missing.
    """
    peft: Any = library("peft", "adapter", "an adapter")
    model: Any = model_of(source)
    if not isinstance(model, peft.PeftModel):
        raise WeightsExportError(
            "an adapter is a part of a model of peft (get_peft_model); found "
            f'{type(model).__name__}: export format="huggingface"'
        )
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise WeightsExportError(
                f"adapter {name} is {type(config).__name__}: of learned prompts, peft's file has "
                "what they compute and not the weights that are trained. Save it by peft's own "
                'save_pretrained, or export all weights, format="safetensors"'
            )
    _refuse_others(peft, model)
    state = source.table.persistent()
    adapters = [_adapter(peft, model, name, state) for name in model.peft_config]

    def write(folder: Folder) -> list[str]:
        # peft takes the names and settings of the model, and no weights
        model.save_pretrained(folder.path, state_dict=dict(state))
        write_card(source, folder, "peft")
        if not source.table.left_out:
            found = _loaded(replica_of(source), folder.path).state_dict()
            check_same(found, state, "peft")
            return []
        for name, expected in zip(model.peft_config, adapters, strict=True):
            where = "" if name == "default" else f"{name}/"
            check_file(folder, f"{where}adapter_model.safetensors", expected)
        return ["the base is in a few bits: the adapter was read back without it"]

    written = {
        name if adapter == "default" else f"{adapter}/{name}": x
        for adapter, each in zip(model.peft_config, adapters, strict=True)
        for name, x in each.items()
    }
    table = make_table(
        written,
        dict.fromkeys(written, "parameter"),
        source.where,
        facts=source.table.facts,
        left=source.table.left_out,
    )
    return Prepared(table, sum(t.nbytes for each in adapters for t in each.values()), write)


def _adapter(
    peft: Any, model: Any, name: str, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the names of its file; of the model's own state by default."""
    found: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=None if state is None else dict(state), adapter_name=name
    )
    return found


def _refuse_others(peft: Any, model: Any) -> None:
    """Weights that are trained and would be left behind.

    Raises:
        WeightsExportError: there are some.
    """
    held = {
        t.data_ptr() for name in model.peft_config for t in _adapter(peft, model, name).values()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in held:
            raise WeightsExportError(
                f"{name} is trained and is no part of the adapter, which would leave without it: "
                'name it in modules_to_save, or export format="huggingface"'
            )


def consumer(path: Path, model: nn.Module) -> Run:
    """What runs an exported folder: the model's base, into which peft has loaded it."""
    return running(_loaded(deepcopy(model), str(path)).eval())


def _loaded(model: Any, path: str) -> Any:
    """What peft makes of a model's base and a folder; the model is used up."""
    import peft

    adapters = list(model.peft_config)
    inner = model.get_base_model()
    copied = {
        name: module.original_module
        for name, module in inner.named_modules()
        if hasattr(module, "original_module")
    }
    base = model.unload()
    # peft leaves the trained copies where their originals were
    for name, original in copied.items():
        above, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(above), leaf, original)
    loaded: Any = None
    for name in adapters:
        where = path if name == "default" else f"{path}/{name}"
        how = {"adapter_name": name, "autocast_adapter_dtype": False}
        if loaded is None:
            loaded = peft.PeftModel.from_pretrained(base, where, **how)
        else:
            loaded.load_adapter(where, **how)
    return loaded
