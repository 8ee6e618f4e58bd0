"""In what two states differ, bit by bit, value by value."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.tensor_file import bytes_of


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """One line for every value of two decoded states that is not the same to the last bit.

    Args:
        at: the name of both, "" for none.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        yield from _tensors(a, b, at)
    elif type(a) is not type(b):
        yield f"{at}: {_shown(a)} | {_shown(b)}"
    elif isinstance(a, Mapping):
        for key in dict.fromkeys([*a, *b]):
            name = f"{at}/{key}" if at else str(key)
            if key not in b:
                yield f"{name}: {_shown(a[key])} | absent"
            elif key not in a:
                yield f"{name}: absent | {_shown(b[key])}"
            else:
                yield from differences(a[key], b[key], name)
    elif isinstance(a, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{at}/{i}")
    elif not _same(a, b):
        yield f"{at}: {_shown(a)} | {_shown(b)}"


def _tensors(a: torch.Tensor, b: torch.Tensor, at: str) -> Iterator[str]:
    if a.dtype != b.dtype or a.shape != b.shape:
        yield f"{at}: {_shown(a)} | {_shown(b)}"
        return
    if not a.numel() or bytes_of(a) == bytes_of(b):
        return
    x, y = (torch.frombuffer(bytes_of(t), dtype=torch.uint8) for t in (a, b))
    count = int((x != y).view(-1, a.itemsize).any(1).sum())
    line = f"{at}: {_shown(a)}, {count} of {a.numel()} elements differ"
    if a.is_floating_point():
        most = (a.double() - b.double()).abs().nan_to_num(0).max().item()
        line += f", by at most {most:.3g}"
    yield line


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return bool(a == b)


def _shown(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{name_of(x.dtype)} {list(x.shape)}"
    if isinstance(x, np.ndarray):
        return f"NumPy {x.dtype} {list(x.shape)}"
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "…"
