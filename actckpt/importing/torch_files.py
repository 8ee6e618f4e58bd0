"""Weights in files of ``torch.save``: state dicts, checkpoints of loops, and of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actckpt.errors import CheckpointFormatError
from actckpt.foreign.stored import held
from actckpt.foreign.torch_file import load_torch_file


def torch_tree(path: Path) -> Any:
    """What a file holds, with a `StoredTensor` in the place of each tensor.

    Raises:
        CheckpointFormatError: damaged, or with objects in it that loading would have to run.
        OSError: it cannot be read.
    """
    try:
        return _stored(load_torch_file(path), str(path))
    except RecursionError as error:
        raise CheckpointFormatError(f"{path} holds dicts within dicts without end") from error


def _stored(x: Any, where: str) -> Any:
    if isinstance(x, torch.Tensor):
        return held(x, where)
    if isinstance(x, Mapping):
        return {str(key): _stored(value, f"{where}: {key}") for key, value in x.items()}
    return x


def is_lightning(tree: Any) -> bool:
    """Whether a file is one of Lightning's checkpoints."""
    return isinstance(tree, Mapping) and {"state_dict", "pytorch-lightning_version"} <= tree.keys()
