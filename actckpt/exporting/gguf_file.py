"""One GGUF file, ``model.gguf``: what llama.cpp runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.gguf_layout import Laid, Layout, layout_of
from actckpt.exporting.gguf_values import (
    QUANTIZATIONS,
    decoded,
    encoded,
    is_exact,
    is_rounded_once,
    kind_of,
    natural,
    size_bytes,
)
from actckpt.exporting.gguf_vocabulary import add_vocabulary, check_vocabulary
from actckpt.exporting.llama_cpp import llama_cpp
from actckpt.exporting.merging import merged
from actckpt.exporting.outputs import Run
from actckpt.exporting.prepared import Asked, Prepared, library
from actckpt.exporting.replica import replica_of
from actckpt.exporting.source import Source, source_of_module
from actckpt.exporting.weights import same_bits

NAME = "model.gguf"


def prepare(source: Source, asked: Asked) -> Prepared:
    """The file, in the quantization that was asked for, or the one that loses nothing.

    Raises:
        ArgumentError: there is no such quantization.
        WeightsExportError: the model, a setting or a weight has no place in such a file.
    """
    library("gguf", "gguf", "a GGUF file")
    source = merged(source, untie=bool(asked.untie))
    quantization = asked.quantization or natural(source.table)
    if quantization not in QUANTIZATIONS:
        raise ArgumentError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}; found {quantization!r}"
        )
    layout = layout_of(source)
    check_vocabulary(asked.tokenizer, source)
    kinds = _kinds(layout, source, quantization)
    tensors = source.table.persistent()

    def write(folder: Folder) -> list[str]:
        path = f"{folder.path}/{NAME}"
        digests = _write(path, layout, source, asked, kinds, quantization)
        check_read_back(path, layout, source, kinds, digests)
        lossy = [n for n, w in _weights(layout) if not is_exact(tensors[w], kinds[n])]
        notes = [f"{len(lossy)} tensors are rounded to {quantization}"] * bool(lossy)
        if asked.tokenizer is None:
            notes.append("without tokenizer=, the file has no vocabulary: give token numbers")
        return notes

    total = sum(size_bytes(tensors[w], kinds[n]) for n, w in _weights(layout))
    return Prepared(source.table, total, write)


def turned_back(path: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The weights that a file has, under the model's names and as the model has them."""
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    return {laid.weight: _back(found[laid.name], laid) for laid in layout.tensors}


def _back(there: Any, laid: Laid) -> torch.Tensor:
    """The weight of a tensor that the gguf library has read."""
    shape = tuple(int(n) for n in reversed(there.shape))
    return laid.turn.back(decoded(there.data, there.tensor_type.name, shape))


def _is_rounded(there: Any, laid: Laid, own: torch.Tensor) -> bool:
    turned = laid.turn.out(own)
    found = decoded(there.data, there.tensor_type.name, tuple(turned.shape))
    return same_bits(laid.turn.back(turned), own) and is_rounded_once(
        found, turned, there.tensor_type.name
    )


def check_read_back(
    path: str, layout: Layout, source: Source, kinds: dict[str, str], digests: dict[str, bytes]
) -> None:
    """That the gguf library reads a file as it was meant: every tensor, and the metadata.

    What was rounded is compared with the weights, too: an encoder's fault reads back as it was
    written.

    Args:
        digests: of the tensors as they were handed to the library, by name.

    Raises:
        WeightsExportError: it does not.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    found = {t.name: t for t in reader.tensors}
    tensors = source.table.persistent()
    if set(found) != {n for n, _ in _weights(layout)} | set(layout.made):
        raise WeightsExportError(f"{NAME} does not hold the tensors that were written")
    for laid in layout.tensors:
        there, kind, own = found[laid.name], kinds[laid.name], tensors[laid.weight]
        if there.tensor_type.name != kind:
            raise WeightsExportError(f"{NAME}: {laid.name} is {there.tensor_type.name}, not {kind}")
        if is_exact(own, kind):
            back = _back(there, laid)
            same = same_bits(back, own.cpu().to(back.dtype))
        else:
            same = _digest(there.data) == digests[laid.name]
        if not same:
            raise WeightsExportError(f"{NAME}: {laid.weight} did not read back bit for bit")
        if not is_exact(own, kind) and not _is_rounded(there, laid, own):
            raise WeightsExportError(
                f"{NAME}: {laid.weight} is farther from the model's than rounding to {kind} makes "
                "it: the encoder is at fault, or the weight has elements beyond the kind or NaN; "
                "quantization F32 has them all"
            )
    for key, value in layout.metadata.items():
        entry = reader.get_field(f"{layout.architecture}.{key}")
        there = None if entry is None else entry.contents()
        wanted = float(np.float32(value)) if isinstance(value, float) else value
        if there != wanted:
            raise WeightsExportError(f"{NAME}: {key} is {there}, not {wanted}")


def consumer(path: Path, model: nn.Module) -> Run:
    """What runs an exported folder: llama.cpp.

    Raises:
        WeightsExportError: cyllama is not installed.
    """
    return llama_cpp(path / NAME)


def rounded(path: Path, model: nn.Module) -> nn.Module:
    """A model of the weights that an exported folder has."""
    source = source_of_module(model, type(model).__name__)
    made = replica_of(merged(source, untie=True), own_memory=True)
    back = turned_back(str(path / NAME), layout_of(source_of_module(made, source.where)))
    with torch.no_grad():
        for name, tensor in back.items():
            made.get_parameter(name).copy_(tensor)
    return made


def _weights(layout: Layout) -> list[tuple[str, str]]:
    return [(laid.name, laid.weight) for laid in layout.tensors]


def _kinds(layout: Layout, source: Source, quantization: str) -> dict[str, str]:
    tensors = source.table.persistent()
    return {
        laid.name: kind_of(laid.name, laid.turn.out(tensors[laid.weight]), quantization)
        for laid in layout.tensors
    }


def _write(
    path: str,
    layout: Layout,
    source: Source,
    asked: Asked,
    kinds: dict[str, str],
    quantization: str,
) -> dict[str, bytes]:
    """The file; digests of its tensors by name."""
    import gguf

    tensors = source.table.persistent()
    writer: Any = gguf.GGUFWriter(path, layout.architecture)
    try:
        writer.add_name(type(source.model).__name__)
        for key, value in layout.metadata.items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](f"{layout.architecture}.{key}", value)
        writer.add_file_type({"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}[quantization])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, asked.tokenizer, source)
        for name, tensor in layout.made.items():
            array = tensor.numpy()
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        for laid in layout.tensors:
            own = laid.turn.out(tensors[laid.weight])
            kind = gguf.GGMLQuantizationType[kinds[laid.name]]
            nbytes = size_bytes(own, kinds[laid.name])
            # of elements, which the library wants where they are no bytes
            writer.add_tensor_info(laid.name, own.shape, np.dtype(np.float32), nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in layout.made.values():
            writer.write_tensor_data(tensor.numpy())
        digests = {}
        # one at a time is in memory, turned and rounded
        for laid in layout.tensors:
            array = encoded(laid.turn.out(tensors[laid.weight]), kinds[laid.name])
            digests[laid.name] = _digest(array)
            writer.write_tensor_data(array)
    finally:
        writer.close()
    return digests


def _digest(array: np.ndarray[Any, Any]) -> bytes:
    return bytes(xxhash.xxh3_128_digest(np.ascontiguousarray(array).tobytes()))
