"""What is asked of an export, what a format makes of it before it writes, and what came of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from actckpt.errors import WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.weights import WeightTable
from actckpt.units import format_bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of `actckpt.export` that belong to a format; None where they were not given."""

    tokenizer: Any = None
    generation_config: Any = None
    max_shard_bytes: int | None = None
    untie: bool | None = None
    quantization: str | None = None
    example: Any = None
    dequantize: bool | None = None

    def given(self) -> set[str]:
        """Names of those that were."""
        return {name for name in self.__slots__ if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True)
class Prepared:
    """An export that nothing stands in the way of, as far as can be told before it is written.

    Args:
        table: what is written: of the merged model, where an adapter is; of an adapter alone,
            under the names of its file.
        size_bytes: of the weights in it.
        write: fills the folder, reads it back as its consumers do, and returns notes.
    """

    table: WeightTable
    size_bytes: int
    write: Callable[[Folder], list[str]]


@dataclass(frozen=True, slots=True)
class Exported:
    """What `actckpt.export` wrote, or would write.

    Args:
        path: the folder.
        format: of the weights in it.
        source: a checkpoint and its item, or the class of a model.
        files: sizes in bytes by name; empty where nothing was written.
        weights_bytes: size of the weights in this format.
        tied: groups of names of one and the same tensor.
        left_out: names of what the format does not hold: values that are no tensors.
        notes: what its consumers should know.
    """

    path: Path
    format: str
    source: str
    files: Mapping[str, int]
    weights_bytes: int
    tied: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        if not self.files:
            size = f"about {format_bytes(self.weights_bytes)} of weights; nothing was written"
        else:
            size = f"{len(self.files)} files, {format_bytes(self.size_bytes)}"
        return "\n".join([f"{self.path}: {self.format}, {size}", *self.notes])


def library(name: str, extra: str, what: str) -> ModuleType:
    """An optional library, imported now.

    Raises:
        WeightsExportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WeightsExportError(
            f"{what} needs {name.partition('.')[0]}: pip install 'actckpt[{extra}]' ({error})"
        ) from error
