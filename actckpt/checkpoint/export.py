"""The weights of a checkpoint as one safetensors file, for whoever wants nothing else of it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.dtypes import CODES, name_of
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import local_path
from actckpt.checkpoint.names import SAVING, unique
from actckpt.checkpoint.reading import read_checkpoint
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.checkpoint.wrapped_names import told_of
from actckpt.errors import CheckpointError

logger = logging.getLogger("actckpt")


def export_weights(
    checkpoint: Checkpoint | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    item: str = "model",
    files: Files | None = None,
) -> Path:
    """The new file of weights; deprecated: `actckpt.export` writes a folder, of many formats.

    Every tensor under its name in the model's ``state_dict``, verified as read.

    What ``load_file`` of safetensors makes of it, ``model.load_state_dict`` takes. Tied weights are
    in it under each of their names. Values that are no tensors are left out, with a warning; so are
    names said to be a wrapper's (``_orig_mod.``, ``module.``), which are kept.

    Args:
        checkpoint: one, its directory, or that of a run, which stands for the newest.
        path: the file; there must be none.
        item: what is exported, such as ``ema``.

    Raises:
        ArgumentError: a path is a URL.
        CheckpointFormatError: the checkpoint is damaged.
        CheckpointError: there is no such checkpoint or item, or the file cannot be written.
    """
    warnings.warn(
        'export_weights is deprecated: actckpt.export(checkpoint, folder, format="safetensors")',
        DeprecationWarning,
        stacklevel=2,
    )
    return write_weights(checkpoint, path, item=item, files=Files() if files is None else files)


def write_weights(
    checkpoint: Checkpoint | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    item: str,
    files: Files,
) -> Path:
    """As `export_weights`."""
    target = local_path(path).absolute()
    found, items = read_checkpoint(files, checkpoint)
    where = str(found.path)
    if item not in items:
        raise CheckpointError(f"{where} has no item {item!r}; it has {', '.join(sorted(items))}")
    tensors = _weights(items[item], f"{where}: {item}")
    try:
        if files.status(str(target)) is not None:
            raise CheckpointError(f"{target} exists: delete it, or export to another file")
        _write(files, tensors, target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}") from error
    if told := told_of(tensors):
        logger.warning("actckpt: %s: %s", target, told)
    return target


def _weights(state: Any, where: str) -> dict[str, torch.Tensor]:
    named = state if isinstance(state, Mapping) else {}
    tensors = {str(k): v for k, v in named.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{where} has no tensors by name; export an item such as model or ema"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(
                f"{where} has {name} as {name_of(tensor.dtype)}, which safetensors files have no "
                "name for; restore the checkpoint and convert it"
            )
    left_out = [str(k) for k in named if str(k) not in tensors]
    if left_out:
        logger.warning("actckpt: %s: not exported, no tensors: %s", where, ", ".join(left_out))
    return tensors


def _write(files: Files, tensors: dict[str, torch.Tensor], target: Path) -> None:
    temporary = str(target.parent / unique(SAVING, target.name))
    try:
        with files.writing(temporary) as sink:
            write_tensors(sink, tensors)
        files.rename(temporary, str(target))
    except BaseException:
        files.remove_tree(temporary)
        raise
    files.sync_directory(str(target.parent))
