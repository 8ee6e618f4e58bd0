"""Files of ``torch.save``, read with ``weights_only=True`` and no other way."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from actckpt.errors import CheckpointFormatError
from actckpt.foreign.stored import check_records

# how files begin: those of torch.save, and those of its old format, which are pickles
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"


class Standin:
    """Takes the place of an object whose class is not here, or must not run."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_torch_file(path: Path, standins: Collection[str] = ()) -> Any:
    """What is in the file; its tensors are windows on it: copy what is kept.

    Checksums are compared, as ``torch.load`` does not.

    Args:
        standins: full names of classes in whose place a `Standin` is put.

    Raises:
        CheckpointFormatError: damaged, no such file, or with objects of other classes in it.
        OSError: it cannot be read.
    """
    where = str(path)
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
        if is_zip:
            check_records(file, where)
    # a file of the old format cannot be mapped
    return _loaded(path, where, standins, mmap=is_zip)


def load_torch_bytes(data: bytes, where: str) -> Any:
    """The same, of what was cut out of a file."""
    stream = io.BytesIO(data)
    if data.startswith(ZIP):
        check_records(stream, where)
    stream.seek(0)
    return _loaded(stream, where, ())


def _loaded(source: Any, where: str, standins: Collection[str], **options: Any) -> Any:
    wanted = dict.fromkeys(standins)
    kinds: list[Any] = [(type(name.rpartition(".")[2], (Standin,), {}), name) for name in wanted]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(kinds):
            warnings.simplefilter("ignore")  # of old formats; it is read, or refused below
            return torch.load(source, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise CheckpointFormatError(_refusal(source, where, error, standins)) from None
    except (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
            RecursionError, RuntimeError, TypeError, ValueError) as error:  # fmt: skip
        raise CheckpointFormatError(
            f"{where} is damaged, or no file of torch.save: {_first_line(error)}"
        ) from error


def _refusal(source: Any, where: str, error: Exception, standins: Collection[str]) -> str:
    # of the old format only the first is known, from what torch says
    named = _classes_in(source) or re.findall(r"\bGLOBAL (\S+) w", str(error))
    found = [name for name in named if name not in standins]
    if not found:
        # and not torch's own words, which recommend to load it without weights_only
        return f"{where} is damaged, or no file of torch.save"
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return (
        f"{where} holds objects, not only tensors and plain values: {shown}. Loading them would "
        "run code that the file chooses, so nothing of it was loaded. Where you trust who made it: "
        "load it in the program that wrote it, and save the weights alone, "
        "torch.save(model.state_dict(), path)"
    )


def _classes_in(source: Any) -> list[str]:
    """Names of what the file would need; none where it cannot be told."""
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:  # of a damaged file anything
        return []


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
