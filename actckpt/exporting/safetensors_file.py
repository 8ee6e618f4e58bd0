"""One safetensors file, ``model.safetensors``: what ``load_file`` and ``load_state_dict`` take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.dtypes import CODES, name_of
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.errors import WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.outputs import Run, blank, running
from actckpt.exporting.prepared import Asked, Prepared
from actckpt.exporting.source import Source
from actckpt.exporting.weights import WeightTable, check_same

NAME = "model.safetensors"


def prepare(source: Source, asked: Asked) -> Prepared:
    """Every persistent tensor under its name; tied ones under each of theirs.

    Raises:
        WeightsExportError: safetensors files have no name for a dtype.
    """
    check_dtypes(source.table, source.where)
    tensors = source.table.persistent()

    def write(folder: Folder) -> list[str]:
        with folder.writing(NAME) as sink:
            write_tensors(sink, tensors)
        check_file(folder, NAME, tensors)
        return []

    return Prepared(source.table, source.table.size_bytes, write)


def check_dtypes(table: WeightTable, where: str) -> None:
    """That safetensors files can hold all of a table.

    Raises:
        WeightsExportError: they cannot.
    """
    for name, tensor in table.persistent().items():
        if tensor.dtype not in CODES:
            raise WeightsExportError(
                f"{where} has {name} as {name_of(tensor.dtype)}, which safetensors files have no "
                "name for: convert it and export the model"
            )


def check_file(folder: Folder, name: str, expected: Mapping[str, torch.Tensor]) -> None:
    """That the safetensors library reads a file as it was meant.

    Raises:
        WeightsExportError: it does not.
    """
    from safetensors import safe_open

    with safe_open(f"{folder.path}/{name}", framework="pt") as file:
        check_same(_OneAtATime(file), expected, name)


class _OneAtATime(Mapping[str, torch.Tensor]):
    """A file's tensors, none of which stays in memory."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def consumer(path: Path, model: nn.Module) -> Run:
    """What runs an exported folder: another model of the class, which has loaded it."""
    from safetensors.torch import load_file

    return loaded_into(model, load_file(path / NAME))


def loaded_into(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Run:
    """A model of other weights that has loaded a state."""
    other = blank(model)
    other.load_state_dict(dict(state))
    return running(other)
