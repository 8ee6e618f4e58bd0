"""``actckpt checkpoint import``: weights of others, as they lie, into one safetensors file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.dtypes import BY_NAME, CODES, name_of
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.commands.parsers import add_command
from actckpt.errors import CheckpointError
from actckpt.exporting.folder import Folder, refuse_existing, write_folder
from actckpt.exporting.safetensors_file import NAME, check_file
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.casting import cast_to
from actckpt.importing.loaded_weights import some
from actckpt.importing.opening import opened
from actckpt.importing.scaled import refuse_without_scale
from actckpt.importing.source import Source
from actckpt.progress import progress_shown, stage
from actckpt.units import format_bytes

_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Add the command to ``commands``."""
    parser = add_command(
        commands,
        "import",
        example="actckpt checkpoint import deepspeed-folder out --dtype bfloat16\n"
        "actckpt checkpoint import dcp-folder out --item ema --dry-run",
        about="weights of DeepSpeed, DCP, Lightning and others, as safetensors in a new folder",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="their file or folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument(
        "--item", help="which part of it, keys joined by dots; by default the model"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of floating-point weights in OUT")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    parser.set_defaults(run=import_weights)


def import_weights(args: argparse.Namespace) -> int:
    """0, after writing the folder.

    Raises:
        CheckpointError: there are no weights that can be read, or they do not fit the dtype.
        WeightsExportError: the folder could not be written; nothing is there then.
    """
    files = Files()
    target = args.out.absolute()
    refuse_existing(files, target)
    with progress_shown():
        stage("looking")
        found = opened(args.source, args.item)
    dtypes = {name: _dtype(name, x, args.dtype, found) for name, x in found.tensors.items()}
    size_bytes = sum(
        x.size_bytes // x.dtype.itemsize * dtypes[name].itemsize
        for name, x in found.tensors.items()
    )
    print(
        f"{found.where} ({found.kind}): {len(dtypes)} tensors, "
        f"{format_bytes(size_bytes)} to {target}",
        flush=True,
    )
    if found.others:
        print(f"left out, no tensors: {some([*found.others])}")
    if args.dry_run:
        print("nothing was written")
        return 0
    with progress_shown():
        stage("reading weights")
        tensors = {
            name: _read(name, x, dtypes[name], found.where) for name, x in found.tensors.items()
        }

    def write(folder: Folder) -> Mapping[str, Any]:
        stage("writing safetensors")
        with folder.writing(NAME) as sink:
            write_tensors(sink, tensors)
        check_file(folder, NAME, tensors)
        return {"weights_format": "safetensors", "source": {"kind": found.kind}}

    with progress_shown():
        entries, _ = write_folder(files, target, size_bytes, write)
    for name, entry in sorted(entries.items()):
        print(f"{name}  {entry.size_bytes} bytes")
    return 0


def _dtype(name: str, x: StoredTensor, wanted: str | None, source: Source) -> torch.dtype:
    dtype = x.dtype if wanted is None or not x.dtype.is_floating_point else BY_NAME[wanted]
    if dtype != x.dtype:
        refuse_without_scale(name, x, source)
    if dtype not in CODES:
        raise CheckpointError(
            f"{source.where} has {name} as {name_of(dtype)}, which safetensors files cannot hold"
        )
    return dtype


def _read(name: str, x: StoredTensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    try:
        value = x.read()
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    return value if value.dtype == dtype else cast_to(value, dtype, name, where)
