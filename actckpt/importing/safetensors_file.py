"""Safetensors files: the header now, each tensor when it is asked for, nothing mapped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.dtypes import BY_CODE
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.tensor_file import Slot, bytes_of, read_header
from actckpt.errors import CheckpointFormatError
from actckpt.foreign.stored import StoredTensor


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; as `read_with_metadata`."""
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors of a file by name, and what else its header says.

    Raises:
        CheckpointFormatError: it is no safetensors file, or its header does not describe it.
        OSError: it cannot be read.
    """
    # the cache of the Hub is made of symbolic links
    real = os.path.realpath(path)
    with Files().reading(real) as source:
        slots, metadata = read_header(source, str(path))
        begin = source.read_bytes
    found = {
        slot.name: StoredTensor(slot.shape, BY_CODE[slot.code], _reader(real, begin, slot))
        for slot in slots
    }
    return found, metadata


def _reader(path: str, begin: int, slot: Slot) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        tensor = torch.empty(slot.shape, dtype=BY_CODE[slot.code])
        if not tensor.numel():
            return tensor
        window = bytes_of(tensor)
        with open(path, "rb") as file:
            file.seek(begin + slot.begin)
            count = file.readinto(window)
        if count != len(window):
            raise CheckpointFormatError(f"{path} ends within {slot.name}")
        return tensor

    return read
