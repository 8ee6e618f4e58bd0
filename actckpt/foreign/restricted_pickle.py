"""The one place where a pickle is read: a list of names, each a stand-in that can do nothing.

The metadata of torch.distributed.checkpoint is a pickle. What it names is compared with the names
that such metadata holds; and not even those are looked up, for a pickle can call what it names, and
set attributes of it.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import torch

from actckpt.errors import CheckpointFormatError


class Record:
    """A stand-in for an object: what it was called with, and the state that it was given."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """An attribute of the object; None where it has none of that name."""
        state = vars(self).get("state")
        return state.get(name) if isinstance(state, dict) else None


# what is only made, and never looked at, or looked at as a record
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint._extension", "StreamTransformExtension"),
        ("torch.serialization", "_get_layout"),
        ("torch", "device"),
        # Python 3.13 names the second
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)
# a pickle gives a class itself a state in vain: `Record` takes one of instances only
_KINDS = {key: type(key[1], (Record,), {}) for key in _RECORDS}
# of these nothing can be changed
_BUILT_IN: dict[tuple[str, str], type] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
}


class _Restricted(pickle._Unpickler):
    """The one of Python, not of C, which allocates whatever the number of a memo asks for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _KINDS:
            return _KINDS[key]
        if key in _BUILT_IN:
            return _BUILT_IN[key]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of it")


class _RefusedError(Exception):
    """A name that no such metadata holds."""


def restricted_load(data: bytes, where: str) -> Any:
    """What a pickle describes, of records, tuples, dicts, lists, numbers, texts and dtypes.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointFormatError: it names anything else, or is no pickle.
    """
    try:
        return _Restricted(data).load()
    except _RefusedError as refused:
        raise CheckpointFormatError(
            f"{where} is a pickle that names {refused}, which metadata of "
            "torch.distributed.checkpoint does not: it was not looked up, and nothing was run. Do "
            "not load this file with anything else either, unless you know who made it"
        ) from None
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointFormatError(
            f"{where} is damaged, or no metadata of torch.distributed.checkpoint: {error!r:.200}"
        ) from error


def kind_of(x: Any) -> str:
    """The name that a record stands for; "" of anything else."""
    return type(x).__name__ if isinstance(x, Record) else ""
