"""What a tensor is called that is stored by its content."""

from __future__ import annotations

import torch
import xxhash

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.tensor_file import bytes_of


def key_of(tensor: torch.Tensor) -> str:
    """``float32-64x64-0123…``: dtype, shape, and xxh3-128 of the elements.

    Two of one key are the same, bit for bit.
    """
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    elements = bytes_of(tensor) if tensor.numel() else b""
    return f"{name_of(tensor.dtype)}-{shape}-{xxhash.xxh3_128_hexdigest(elements)}"
