"""A tensor in somebody's file: what it is, before anything of it is read."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import torch

from actckpt.checkpoint.dtypes import name_of
from actckpt.errors import CheckpointFormatError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Args:
        read: its values, on the CPU, in memory of their own; raises CheckpointFormatError where the
            file does not hold what it says.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} {list(self.shape)}"


# keys to tensors, to further trees, or to plain values
Tree: TypeAlias = Mapping[str, Any]


def held(tensor: torch.Tensor, where: str) -> StoredTensor:
    """A tensor that is there already; one that is not plain and dense cannot be read."""
    x = tensor.detach()

    def read() -> torch.Tensor:
        if x.layout != torch.strided or x.is_quantized or type(x) is not torch.Tensor:
            raise CheckpointFormatError(
                f"{where} is a {type(x).__name__} of {name_of(x.dtype)}, {x.layout}: only plain, "
                "dense tensors can be read"
            )
        # what is conjugated or negated is so no more in a copy
        return x.cpu().clone()

    return StoredTensor(tuple(x.shape), x.dtype, read)


def check_records(file: BinaryIO | io.BytesIO, where: str) -> None:
    """Compares the checksums of a file of ``torch.save``, where it has any.

    Raises:
        CheckpointFormatError: a part of it is not what was written.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            wrong = [name for name in names if not _is_sound(archive, name)]
    # where an offset in it lies before its beginning, it is an OSError
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError,
            ValueError) as error:  # fmt: skip
        raise CheckpointFormatError(f"{where} is damaged: {error}") from error
    # torch can be told to write none, and then every one is wrong
    if 0 < len(wrong) < len(names):
        raise CheckpointFormatError(
            f"{where} is damaged: {wrong[0]} in it is not what was written (its checksum differs); "
            "use another copy"
        )


def _is_sound(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as part:
            while part.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        if "CRC" not in str(error):
            raise
        return False
    return True
