"""Elements as GGUF files have them: whole, or in quantized blocks of a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actckpt.checkpoint.dtypes import name_of
from actckpt.errors import WeightsExportError
from actckpt.exporting.weights import WeightTable, same_bits

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# the dtype of weights that a file of this kind holds without a loss
LOSSLESS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDENED = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 32
_BLOCKS_AT_ONCE = 1 << 18
# the multiple of its scale that the largest of a block is, and how many scales an element may be
# off: half of one, but of Q4_0, whose -8 to 7 has no number for an opposite of the largest
_STEPS = {"Q8_0": (127, 0.5), "Q4_0": (8, 1.0)}


def natural(table: WeightTable) -> str:
    """What holds a table's matrices without a loss."""
    dtypes = {t.dtype for t in table.persistent().values() if t.dim() > 1}
    for kind, dtype in LOSSLESS.items():
        if dtypes == {dtype}:
            return kind
    return "F32"


def kind_of(name: str, tensor: torch.Tensor, quantization: str) -> str:
    """What a tensor of a file is stored as: vectors and positions whole, as its readers expect.

    Raises:
        WeightsExportError: its rows are no whole blocks, or its elements no numbers of the kind.
    """
    if tensor.dtype not in _WIDENED:
        raise WeightsExportError(
            f"{name} is {name_of(tensor.dtype)}; GGUF files are written of float32, float16 and "
            "bfloat16: convert the model"
        )
    if tensor.dim() < 2 or name == "position_embd.weight":
        return "F32"
    if quantization.startswith("Q") and tensor.shape[-1] % _BLOCK:
        raise WeightsExportError(
            f"{name} has rows of {tensor.shape[-1]} elements, and {quantization} takes {_BLOCK} at "
            "a time: quantization F16, BF16 or F32"
        )
    if quantization == "F16" and tensor.dtype != torch.float16 and tensor.numel():
        largest = float(tensor.abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise WeightsExportError(
                f"{name} has an element of {largest:g}, which float16 cannot hold: BF16 or F32"
            )
    return quantization


def is_exact(tensor: torch.Tensor, kind: str) -> bool:
    """Whether storing a tensor so loses nothing."""
    return kind == "F32" or tensor.dtype == LOSSLESS.get(kind)


def encoded(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The elements as the file has them, as bytes where numpy knows no such numbers."""
    import gguf

    plain = tensor.cpu().contiguous()
    if kind == "F32":
        return np.asarray(plain.to(torch.float32).numpy())
    if kind == "F16":
        return np.asarray(plain.to(torch.float16).numpy())
    if kind == "BF16":
        return np.asarray(plain.to(torch.bfloat16).view(torch.uint8).numpy())
    return np.asarray(gguf.quantize(plain.float().numpy(), gguf.GGMLQuantizationType[kind]))


def decoded(raw: np.ndarray[Any, Any], kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers that a file has, those of quantized blocks as float32."""
    import gguf

    if kind in LOSSLESS:
        flat = torch.from_numpy(np.array(raw).view(np.uint8).reshape(-1))
        return flat.view(LOSSLESS[kind]).reshape(shape)
    numbers = gguf.dequantize(np.array(raw), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(numbers)).reshape(shape)


def is_rounded_once(there: torch.Tensor, own: torch.Tensor, kind: str) -> bool:
    """Whether numbers of a file are those that rounding weights once makes of them.

    Args:
        there: as `decoded`.
        own: the weights, in the order of the file.
        kind: of quantized blocks within half a step of the block's scale, the scale's own rounding
            to float16 added; of others the nearest number.
    """
    if kind in LOSSLESS:
        return same_bits(there, own.cpu().to(LOSSLESS[kind]))
    largest, farthest = _STEPS[kind]
    pairs = (x.reshape(-1, _BLOCK).split(_BLOCKS_AT_ONCE) for x in (there, own.cpu()))
    for found, block in zip(*pairs, strict=True):
        wanted = block.double()
        scale = wanted.abs().amax(dim=1, keepdim=True) / largest
        # half of float16's last place, which below its normal numbers is a fixed one
        rounding = (scale * 2.0**-11).clamp(min=2.0**-25)
        # float32 is what the encoder computes in
        bound = (scale * farthest + rounding * largest) * (1 + 1e-5)
        if not bool(((found.double() - wanted).abs() <= bound).all()):
            return False
    return True


def size_bytes(tensor: torch.Tensor, kind: str) -> int:
    """Of a tensor in the file."""
    per_block = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34, "Q4_0": 18}[kind]
    return tensor.numel() * per_block // _BLOCK
