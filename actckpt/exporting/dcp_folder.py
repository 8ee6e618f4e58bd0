"""A folder of torch.distributed.checkpoint: torch's own writer, and not its reader."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from actckpt.errors import WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.outputs import Run
from actckpt.exporting.prepared import Asked, Prepared
from actckpt.exporting.safetensors_file import loaded_into
from actckpt.exporting.source import Source
from actckpt.exporting.weights import check_same
from actckpt.foreign.dcp import read_dcp


def prepare(source: Source, asked: Asked) -> Prepared:
    """Every persistent tensor under its name, as ``dcp.load(model.state_dict(), …)`` wants it."""
    tensors = {name: x.cpu() for name, x in source.table.persistent().items()}
    size_bytes = sum(x.numel() * x.itemsize for x in tensors.values())

    def write(folder: Folder) -> list[str]:
        try:
            with warnings.catch_warnings():  # that it asks no other process
                warnings.simplefilter("ignore", UserWarning)
                save(dict(tensors), checkpoint_id=folder.path, no_dist=True)
        except CheckpointException as error:  # which is no Exception
            reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
            raise WeightsExportError(
                f"torch could not write {folder.path}: {reasons}. Nothing is left; remove the "
                "cause, or export elsewhere"
            ) from error
        found = {name: x.read() for name, x in read_dcp(Path(folder.path)).items()}
        check_same(found, tensors, "the folder")
        return []

    return Prepared(source.table, size_bytes, write)


def consumer(path: Path, model: nn.Module) -> Run:
    """What runs an exported folder: another model of the class, into which torch has loaded it."""
    state = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    load(state, checkpoint_id=path, no_dist=True)
    return loaded_into(model, state)
