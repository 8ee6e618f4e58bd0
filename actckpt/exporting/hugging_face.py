"""The layout of Hugging Face: config, sharded safetensors with an index, and what goes with it.

By the model's own ``save_pretrained`` where it has one; else by huggingface_hub's splitter.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.merging import merged
from actckpt.exporting.model_card import NAME as CARD
from actckpt.exporting.model_card import model_card
from actckpt.exporting.outputs import Run, blank, running
from actckpt.exporting.prepared import Asked, Prepared, library
from actckpt.exporting.replica import replica_of
from actckpt.exporting.safetensors_file import check_dtypes, check_file
from actckpt.exporting.source import Source
from actckpt.exporting.weights import same_bits

SHARD_BYTES = 5_000_000_000
CONFIG = "config.json"


def prepare(source: Source, asked: Asked) -> Prepared:
    """The folder that ``from_pretrained`` makes the same model of.

    Raises:
        ArgumentError: the size of a shard is none.
        WeightsExportError: there is no model, it cannot be copied, or huggingface_hub is missing.
    """
    source = merged(source, untie=bool(asked.untie))
    check_dtypes(source.table, source.where)
    library("huggingface_hub", "huggingface", "the layout of Hugging Face")
    model = replica_of(source)
    shard_bytes = SHARD_BYTES if asked.max_shard_bytes is None else asked.max_shard_bytes
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError(f"max_shard_bytes must be a number of bytes; found {shard_bytes!r}")
    own = hasattr(model, "save_pretrained") and hasattr(type(model), "from_pretrained")

    def write(folder: Folder) -> list[str]:
        if own:
            _save(model, source, folder, shard_bytes)
        else:
            _split(source, folder, shard_bytes)
        if asked.generation_config is not None:
            asked.generation_config.save_pretrained(folder.path)
        if asked.tokenizer is not None:
            asked.tokenizer.save_pretrained(folder.path)
        write_card(source, folder, "transformers" if own else "pytorch")
        return _read_back(model, source, folder) if own else []

    return Prepared(source.table, source.table.size_bytes, write)


def _save(model: Any, source: Source, folder: Folder, shard_bytes: int) -> None:
    how = {"state_dict": source.table.persistent(), "max_shard_size": shard_bytes}
    takes = inspect.signature(model.save_pretrained).parameters
    with _quiet():
        model.save_pretrained(folder.path, **{k: v for k, v in how.items() if k in takes})


def write_card(source: Source, folder: Folder, library: str) -> None:
    """The model card, in place of what a library has written as one.

    Args:
        library: what loads the weights, as the Hub names it.
    """
    folder.files.remove_tree(f"{folder.path}/{CARD}")
    with folder.writing(CARD) as sink:
        sink.write(model_card(source, library).encode())


def _split(source: Source, folder: Folder, shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = source.table.persistent()
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        with folder.writing(file) as sink:
            write_tensors(sink, part)
        check_file(folder, file, part)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder, "model.safetensors.index.json", index)
    _write_json(folder, CONFIG, {"architectures": [type(source.model).__name__]})


def _write_json(folder: Folder, name: str, data: Any) -> None:
    with folder.writing(name) as sink:
        sink.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def _read_back(model: nn.Module, source: Source, folder: Folder) -> list[str]:
    """What consumers should know of what ``from_pretrained`` makes of the folder.

    Raises:
        WeightsExportError: it makes another model of it.
    """
    kind: Any = type(model)
    loaded, missing = _from_pretrained(kind, folder.path)
    if missing:
        raise WeightsExportError(
            f"{kind.__name__}.from_pretrained does not find its own weights in what its "
            f"save_pretrained wrote: {missing[0]}"
        )
    found = loaded.state_dict()
    cast: dict[str, list[str]] = {}
    for name, tensor in source.table.persistent().items():
        if name not in found:
            raise WeightsExportError(f"{kind.__name__}.from_pretrained has no {name}")
        if found[name].dtype != tensor.dtype:
            change = f"{name_of(tensor.dtype)} to {name_of(found[name].dtype)}"
            cast.setdefault(change, []).append(name)
        if not same_bits(found[name], tensor.to(found[name].dtype)):
            raise WeightsExportError(
                f"{kind.__name__}.from_pretrained has other values of {name} than were exported"
            )
    return [
        f"from_pretrained casts {len(names)} tensors from {change}, the dtype of the "
        f"configuration ({names[0]}, …); the file has them as they were"
        for change, names in cast.items()
    ]


def consumer(path: Path, model: Any) -> Run:
    """What runs an exported folder: ``from_pretrained``, or the Hub's loading of an own model."""
    # an adapter is merged into it
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind: Any = type(base)
    if hasattr(kind, "from_pretrained"):
        return running(_from_pretrained(kind, str(path))[0].eval())
    from huggingface_hub import load_torch_model

    other = blank(model)
    load_torch_model(other, path, strict=True)
    return running(other)


def _from_pretrained(kind: Any, path: str) -> tuple[Any, list[str]]:
    """(the model of a folder, names that were missing, too many or of another shape).

    Only transformers tells such names; what others make up shows in the values.
    """
    transformers: Any = sys.modules.get("transformers")
    with _quiet(), torch.random.fork_rng(devices=[]):
        if transformers is None or not issubclass(kind, transformers.PreTrainedModel):
            return kind.from_pretrained(path), []
        made, told = kind.from_pretrained(path, dtype="auto", output_loading_info=True)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return made, [str(name) for key in keys for name in told[key]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of transformers, where that is what saves."""
    logging: Any = sys.modules.get("transformers.utils.logging")
    if logging is None or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
