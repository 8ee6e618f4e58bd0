"""What lies at a path, and how its weights are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import local_path
from actckpt.checkpoint.names import MANIFEST, parse_step_name
from actckpt.checkpoint.reading import read_checkpoint
from actckpt.errors import ArgumentError, CheckpointError, CheckpointFormatError
from actckpt.foreign.dcp import METADATA, read_dcp
from actckpt.foreign.deepspeed import read_deepspeed
from actckpt.foreign.deepspeed_files import is_deepspeed
from actckpt.foreign.stored import StoredTensor, held
from actckpt.foreign.torch_file import PICKLE, ZIP
from actckpt.importing.adapters import adapter_config
from actckpt.importing.huggingface import INDEX, read_indexed, weights_file
from actckpt.importing.sharded_safetensors import kind_of, read_alone, read_shards
from actckpt.importing.source import Source, source_in
from actckpt.importing.tensorflow import SUFFIX, index_in, index_of, read_tensorflow
from actckpt.importing.torch_files import is_lightning, torch_tree

# how files begin that are known, and read by nobody here
_OTHERS = {
    b"GGUF": "a GGUF file, which is made for inference: load the weights that it was made of",
    b"\x89HDF": "an HDF5 file (Keras): save the weights there as safetensors or NumPy arrays",
    b"\x93NUM": "an array of NumPy: pass numpy arrays as tensors in a dict",
}
_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


def opened(
    where: Checkpoint | str | os.PathLike[str] | Mapping[str, torch.Tensor], item: str | None
) -> Source:
    """The weights at a path, or those given.

    Raises:
        ArgumentError: it is neither a path nor a dict of tensors, or a URL.
        CheckpointError: there is nothing of that kind, or it cannot be read.
        CheckpointFormatError: it is damaged, empty, or hostile.
    """
    if isinstance(where, Checkpoint):
        return _own(where, item)
    if isinstance(where, Mapping):
        given = _whole("the dict", "a dict of tensors", _given(where), item)
        return replace(given, others=_not_tensors(where))
    if not isinstance(where, str | os.PathLike):
        raise ArgumentError(f"give a path, or a dict of tensors; found {type(where).__name__}")
    path = local_path(where)
    try:
        if path.is_dir():
            return _folder(path, item)
        if path.is_file():
            return _file(path, item)
        if (index := index_of(path)) is not None:
            return _of_tensorflow(index, item)
        if path.exists():
            raise CheckpointError(f"{path} is neither a file nor a folder")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(
        f"{path} does not exist: give a file or a folder on this machine (weights of the Hub are "
        "fetched by huggingface_hub.snapshot_download, which returns their folder)"
    )


def _given(state: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    return {str(k): held(v, str(k)) for k, v in state.items() if isinstance(v, torch.Tensor)}


def _not_tensors(state: Mapping[Any, Any]) -> tuple[str, ...]:
    return tuple(str(k) for k, v in state.items() if not isinstance(v, torch.Tensor))


def _own(where: Checkpoint | str, item: str | None) -> Source:
    checkpoint, items = read_checkpoint(Files(), where)
    item = "model" if item is None else item
    if item not in items:
        raise CheckpointError(
            f"{checkpoint.path} has no item {item!r}; it has {', '.join(sorted(items))}"
        )
    state = items[item]
    tensors = _given(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{checkpoint.path}: {item} has no tensors by name; try model or ema")
    kind = "a checkpoint of actckpt"
    return Source(str(checkpoint.path), kind, tensors, others=_not_tensors(state))


def _of_tensorflow(index: Path, item: str | None) -> Source:
    return _whole(str(index), "a checkpoint of TensorFlow", read_tensorflow(index), item)


def _whole(where: str, kind: str, tensors: Mapping[str, StoredTensor], item: str | None) -> Source:
    """What has no parts to choose from."""
    if item is not None:
        raise CheckpointError(f"{where} is {kind}, which has no parts: leave item={item!r} out")
    if not tensors:
        raise CheckpointFormatError(f"{where} holds no tensors")
    return Source(where, kind, tensors)


def _folder(path: Path, item: str | None) -> Source:
    names = sorted(os.listdir(path))
    where = str(path)
    if MANIFEST in names or any(parse_step_name(name) for name in names):
        return _own(where, item)
    if METADATA in names:
        kind = "a folder of torch.distributed.checkpoint"
        return source_in(read_dcp(path), item, where, kind)
    if found := weights_file(path):
        return _file(found, item)
    if is_deepspeed(path):
        return source_in(read_deepspeed(path), item, where, "a ZeRO checkpoint of DeepSpeed")
    several = [path / name for name in names if name.endswith(".safetensors")]
    if several and (shards := read_shards(several)):
        return _whole(where, kind_of(several), shards, item)
    alone = several or [path / name for name in names if name.endswith(_TORCH_FILES)]
    if len(alone) == 1:
        return _file(alone[0], item)
    if (index := index_in(path)) is not None:
        return _of_tensorflow(index, item)
    raise CheckpointError(
        f"{path} holds no weights of a kind that is known: it has "
        f"{', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}. Folders of "
        "Hugging Face, PEFT, DeepSpeed, torch.distributed.checkpoint and of actckpt are, and files "
        "of safetensors and torch.save"
    )


def _file(path: Path, item: str | None) -> Source:
    source = _read(path, item)
    is_adapter = path.name.startswith("adapter_model.")
    return replace(source, adapter=adapter_config(path.parent)) if is_adapter else source


def _read(path: Path, item: str | None) -> Source:
    where = str(path)
    with open(path, "rb") as file:
        begins = file.read(16)
    if not begins:
        raise CheckpointFormatError(f"{path} is empty")
    if other := next((told for magic, told in _OTHERS.items() if begins.startswith(magic)), None):
        raise CheckpointFormatError(f"{path} is {other}")
    if path.name.endswith(INDEX):
        return _whole(where, "weights in several files", read_indexed(path), item)
    if path.name.endswith(SUFFIX):
        return _of_tensorflow(path, item)
    if path.name == METADATA or path.suffix == ".distcp":
        raise ArgumentError(f"{path} is one file of a checkpoint in many: give its folder")
    if begins.startswith((ZIP, PICKLE)):
        tree = torch_tree(path)
        kind = "a checkpoint of Lightning" if is_lightning(tree) else "a file of torch.save"
        return source_in(tree, item, where, kind)
    return _whole(where, "a safetensors file", read_alone(path), item)
