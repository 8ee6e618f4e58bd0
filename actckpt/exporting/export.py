"""`export`: weights into a new folder, in the format of whoever runs them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import local_path
from actckpt.errors import ArgumentError
from actckpt.exporting.folder import Folder, refuse_existing, write_folder
from actckpt.exporting.prepared import Asked, Exported, Prepared
from actckpt.exporting.quantized_weights import Quantized
from actckpt.exporting.source import Source, source_of
from actckpt.exporting.weights import WeightTable
from actckpt.progress import stage

# format -> the module whose `prepare` makes it, and the arguments that it takes
FORMATS: dict[str, tuple[str, frozenset[str]]] = {
    "safetensors": ("safetensors_file", frozenset({"dequantize"})),
    "huggingface": (
        "hugging_face",
        frozenset({"tokenizer", "generation_config", "max_shard_bytes", "untie"}),
    ),
    "pt": ("pt_file", frozenset({"dequantize"})),
    "dcp": ("dcp_folder", frozenset()),
    "adapter": ("adapter", frozenset()),
    "onnx": ("onnx_file", frozenset({"untie", "example"})),
    "gguf": ("gguf_file", frozenset({"tokenizer", "untie", "quantization"})),
}


def export(
    source: nn.Module | Checkpoint | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    item: str = "model",
    model: nn.Module | None = None,
    tokenizer: Any = None,
    generation_config: Any = None,
    max_shard_bytes: int | None = None,
    untie: bool | None = None,
    quantization: str | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
    dequantize: bool | None = None,
    dry_run: bool = False,
    files: Files | None = None,
) -> Exported:
    """A new folder of weights, written, made durable, and read back as its consumers read it.

    It appears whole, with a manifest of checksums (``actckpt-export.json``), or not at all. The
    model is not changed: what a library saves is a copy that shares its weights.

    Args:
        source: a model, wrapped or not, or a checkpoint, its directory, or that of a run.
        path: the folder; there must be none.
        format: "safetensors", one file; "huggingface", what ``from_pretrained`` loads, an adapter
            merged into its base; "adapter", the trainable part of a model of peft, in peft's
            layout; "pt", one file that ``torch.load(weights_only=True)`` reads; "dcp", a folder
            that torch.distributed.checkpoint loads in any world; "gguf", one file
            that llama.cpp runs, of GPT-2, Llama, Mistral, Qwen2, Qwen3 and Phi-3 models; "onnx",
            what ONNX Runtime runs, in evaluation mode.
        item: of a checkpoint, such as ``ema``.
        model: of a checkpoint: the model that gives the architecture; its weights are not used.
        tokenizer: huggingface, gguf: what goes with the weights.
        generation_config: huggingface: in place of the model's own.
        max_shard_bytes: huggingface: of a file of weights; 5 GB where it is not given.
        untie: huggingface, gguf, onnx: lets weights that are tied become two where merging an
            adapter changes one of them; else that is refused.
        quantization: gguf: "F32", "F16", "BF16", "Q8_0" or "Q4_0", of matrices; where it is not
            given, one that loses nothing.
        example: onnx: the tensors of one call by argument, two rows or more; rows, and tokens of
            whole numbers, may be as many in others. Not needed of models of transformers that
            take ``input_ids``.
        dequantize: safetensors, pt: makes weights in a few bits (bitsandbytes, torchao) dense;
            else they are refused, but for an adapter, which is exported without them.
        dry_run: says what would be written, and what stands in the way, and writes nothing.

    Raises:
        ArgumentError: an argument is none of these, or not one of this format.
        CheckpointError: there is no such checkpoint or item, or it is damaged.
        WeightsExportError: the format cannot hold these weights, a library is missing, the folder
            cannot be written, or it did not read back as written. Nothing is there then.
    """
    asked = Asked(
        tokenizer, generation_config, max_shard_bytes, untie, quantization, example, dequantize
    )
    begun = begin(source, path, format=format, item=item, model=model, asked=asked, files=files)
    return begun.planned if dry_run else begun.write()


@dataclass(frozen=True, slots=True)
class Begun:
    """An export of which nothing is written yet.

    Args:
        planned: what would be written.
    """

    planned: Exported
    _files: Files
    _source: Source
    _prepared: Prepared

    def write(self) -> Exported:
        """What was written.

        Raises:
            WeightsExportError: as `export`.
        """
        notes: list[str] = []
        format = self.planned.format

        def write(folder: Folder) -> dict[str, Any]:
            stage(f"writing {format}")
            notes.extend(self._prepared.write(folder))
            return _manifest(self._source, self._prepared.table, format, notes)

        size_bytes = self._prepared.size_bytes
        entries, _ = write_folder(self._files, self.planned.path, size_bytes, write)
        sizes = {name: entry.size_bytes for name, entry in entries.items()}
        return replace(self.planned, files=sizes, notes=tuple(notes))


def begin(
    source: nn.Module | Checkpoint | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str,
    item: str,
    model: nn.Module | None,
    asked: Asked,
    files: Files | None,
) -> Begun:
    """All of an export that can be done before anything is written; as `export`."""
    if format not in FORMATS:
        raise ArgumentError(f"format must be one of {', '.join(FORMATS)}; found {format!r}")
    files = Files() if files is None else files
    target = local_path(path).absolute()
    module, takes = FORMATS[format]
    if strange := sorted(asked.given() - takes):
        raise ArgumentError(f"{strange[0]} is no argument of format {format!r}")
    refuse_existing(files, target)
    stage("reading weights")
    few_bits: Quantized = "dense" if asked.dequantize else "refuse"
    if format == "adapter":
        few_bits = "leave"
    found = source_of(files, source, item=item, model=model, quantized=few_bits)
    made = importlib.import_module(f"actckpt.exporting.{module}")
    prepare: Callable[[Source, Asked], Prepared] = made.prepare
    prepared = prepare(found, asked)
    planned = Exported(
        path=target,
        format=format,
        source=found.where,
        files={},
        weights_bytes=prepared.size_bytes,
        tied=prepared.table.tied,
        left_out=prepared.table.left_out,
    )
    return Begun(planned, files, found, prepared)


def _manifest(source: Source, table: WeightTable, format: str, notes: list[str]) -> dict[str, Any]:
    facts = {k: table.facts[k] for k in ("step", "versions") if k in table.facts}
    return {
        "weights_format": format,
        "source": {"model": type(source.model).__name__ if source.model else "", **facts},
        "tied": [list(group) for group in table.tied],
        "left_out": list(table.left_out),
        "notes": notes,
        "tensors": {
            name: {
                "dtype": name_of(weight.tensor.dtype),
                "shape": list(weight.tensor.shape),
                "role": weight.role,
            }
            for name, weight in table.weights.items()
        },
    }
