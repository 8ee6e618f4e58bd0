"""Folders in the layout of Hugging Face: one file of weights, or several with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actckpt.checkpoint.documents import parsed
from actckpt.errors import CheckpointFormatError
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.safetensors_file import read_safetensors
from actckpt.importing.torch_files import torch_tree

# the best first
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
_NAMES = (
    *(f"{stem}.safetensors" for stem in _STEMS),
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
)
INDEX = ".index.json"


def weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder, or the index of several; None where there is neither.

    Raises:
        CheckpointFormatError: there are both, of the same format.
    """
    for name in _NAMES:
        whole, index = folder / name, folder / f"{name}{INDEX}"
        if whole.is_file() and index.is_file():
            raise CheckpointFormatError(
                f"{folder} holds {whole.name} and {index.name}: weights that were saved whole, and "
                "in several files, and nothing says which are newer. Delete the old ones, or give "
                "the path of the one that you mean"
            )
        if whole.is_file() or index.is_file():
            return whole if whole.is_file() else index
    return None


def read_indexed(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all files that an index names.

    Raises:
        CheckpointFormatError: the index is none, or does not agree with the files.
        OSError: a file cannot be read.
    """
    table = _table(index)
    by_file: dict[str, dict[str, Any]] = {}
    for file in dict.fromkeys(table.values()):
        path = index.parent / file
        if not path.is_file():
            raise CheckpointFormatError(f"{index} names {file}, which is not there: copy it, too")
        by_file[file] = read_any(path)
    if lost := [name for name, file in table.items() if name not in by_file[file]]:
        raise CheckpointFormatError(
            f"{index} says that {lost[0]} is in {table[lost[0]]}, where it is not; the index is "
            "of other files"
        )
    return {name: by_file[file][name] for name, file in table.items()}


def read_any(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by what it is called."""
    if path.name.endswith(".safetensors"):
        return read_safetensors(path)
    tree = torch_tree(path)
    if not isinstance(tree, dict):
        raise CheckpointFormatError(f"{path} holds no tensors by name")
    return {k: v for k, v in tree.items() if isinstance(v, StoredTensor)}


def _table(index: Path) -> dict[str, str]:
    found = parsed(index.read_bytes(), str(index))
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointFormatError(f"{index} has no weight_map: it is no index of weights")
    for name, file in table.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointFormatError(
                f"{index} has {name} in {file!r:.120}, which is no file beside it; nothing of it "
                "was read"
            )
    return table
