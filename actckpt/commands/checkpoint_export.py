"""``actckpt checkpoint export | convert``: weights, for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn

from actckpt.checkpoint.export import write_weights
from actckpt.checkpoint.files import Files
from actckpt.commands.architectures import architecture, pretrained, tokenizer_of
from actckpt.commands.parsers import add_command
from actckpt.exporting.export import FORMATS, begin
from actckpt.exporting.prepared import Asked
from actckpt.progress import progress_shown
from actckpt.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add these commands to ``commands``."""
    parser = add_command(
        commands,
        "export",
        example="actckpt checkpoint export runs/mine out --format huggingface --model gpt2\n"
        "actckpt checkpoint export runs/mine out --format gguf --model my-folder --dry-run",
        about="the weights for other programs, in a new folder",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN|CHECKPOINT", help="a run for its newest"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument(
        "--model",
        metavar="TARGET",
        help="what the weights are of: module:function that returns (model, batch), a Hugging Face "
        "model type, or a folder with its config.json",
    )
    parser.add_argument("--item", default="model", help="what to export, such as ema")
    _add_options(parser, required=False)
    parser.set_defaults(run=export)
    convert_parser = add_command(
        commands,
        "convert",
        example="actckpt checkpoint convert my-folder out --format gguf --quantization Q8_0",
        about="a folder of Hugging Face's in another format",
    )
    convert_parser.add_argument("folder", type=Path, metavar="FOLDER", help="with a config.json")
    convert_parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    _add_options(convert_parser, required=True)
    convert_parser.set_defaults(run=convert)


def export(args: argparse.Namespace) -> int:
    """0, after writing the folder; without ``--format`` a safetensors file, as earlier versions.

    Raises:
        CheckpointError, WeightsExportError: as `actckpt.export`.
    """
    if args.format is None:
        path = write_weights(args.checkpoint, args.out, item=args.item, files=Files())
        print(f"{path}: {path.stat().st_size} bytes")
        print(
            "actckpt: one file, without --format, is deprecated: --format safetensors",
            file=sys.stderr,
        )
        return 0
    model, example = (None, None) if args.model is None else architecture(args.model)
    asked = _asked(args, args.tokenizer, example)
    return _run(args, args.checkpoint, model, asked, args.item)


def convert(args: argparse.Namespace) -> int:
    """0, after writing the folder.

    Raises:
        TargetError: the folder is none of a model.
        WeightsExportError: as `actckpt.export`.
    """
    with progress_shown():
        model = pretrained(args.folder)
    asked = _asked(args, args.tokenizer or args.folder, None)
    return _run(args, model, None, asked, "model")


def _run(
    args: argparse.Namespace, source: Path | nn.Module, model: nn.Module | None, asked: Asked,
    item: str,
) -> int:  # fmt: skip
    how: dict[str, Any] = {"format": args.format, "item": item, "model": model, "asked": asked}
    with progress_shown():
        begun = begin(source, args.out, **how, files=None)
    told = begun.planned
    size = format_bytes(told.weights_bytes)
    print(f"{told.source}: about {size} of weights to {told.path}, {told.format}", flush=True)
    if args.dry_run:
        print("nothing was written")
        return 0
    with progress_shown():
        done = begun.write()
    for name, size_bytes in sorted(done.files.items()):
        print(f"{name}  {size_bytes} bytes")
    for note in done.notes:
        print(note)
    return 0


def _add_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--format", choices=FORMATS, required=required, help="of the weights")
    parser.add_argument("--quantization", metavar="KIND", help="gguf: F32, F16, BF16, Q8_0 or Q4_0")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="huggingface, gguf: its tokenizer goes too"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, metavar="GB", help="huggingface: of a file, 10^9 bytes"
    )
    parser.add_argument(
        "--untie", action="store_true", help="weights that merging an adapter parts become two"
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="safetensors, pt: weights in a few bits made dense",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")


def _asked(args: argparse.Namespace, tokenizer: Path | None, example: Any) -> Asked:
    takes = FORMATS[args.format][1]
    shard = args.max_shard_gb
    return Asked(
        tokenizer=tokenizer_of(tokenizer) if tokenizer and "tokenizer" in takes else None,
        max_shard_bytes=None if shard is None else int(shard * 1e9),
        untie=args.untie or None,
        quantization=args.quantization,
        dequantize=args.dequantize or None,
        example=example if "example" in takes else None,
    )
