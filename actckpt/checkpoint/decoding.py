"""The inverse of `actckpt.checkpoint.encoding`: JSON and named tensors to a nested state."""

from __future__ import annotations

import base64
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from actckpt.checkpoint.dtypes import BY_NAME
from actckpt.checkpoint.wrappers import wrapper_named
from actckpt.errors import CheckpointFormatError

_NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUMmV]\d{1,9}(\[[0-9A-Za-z]{1,8}\])?")


def decode(tree: Any, tensors: Mapping[str, torch.Tensor], where: str) -> Any:
    """The state that `encode` made ``tree`` and ``tensors`` of.

    Args:
        where: the file that the tree is from, for messages.

    Raises:
        CheckpointFormatError: the tree is none that `encode` makes.
    """
    try:
        return _Decoder(tensors).decode(tree)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{where}: {error}") from error
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError, struct.error) as error:
        raise CheckpointFormatError(f"{where} describes no state: {error!r}") from error


class _Decoder:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._strided: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def decode(self, x: Any) -> Any:
        if isinstance(x, list):
            return [self.decode(v) for v in x]
        if not isinstance(x, dict):
            return x
        tag = next(iter(x), "")
        if not tag.startswith("$"):
            return {k: self.decode(v) for k, v in x.items()}
        read = _TAGS.get(tag)
        if read is None:
            raise CheckpointFormatError(f"unknown {tag}; a newer actckpt may have written it")
        return read(self, x)

    def tensor(self, x: dict[str, Any]) -> torch.Tensor:
        name = x["$tensor"]
        found = self._tensors[name]
        if "stride" not in x:
            return found
        key = name, tuple(x["stride"])
        if key not in self._strided:
            out = _permuted(found, key[1])
            self._strided[key] = out.copy_(found)
        return self._strided[key]

    def array(self, x: dict[str, Any]) -> np.ndarray[Any, Any]:
        raw = self._tensors[x["$ndarray"]]
        return np.frombuffer(bytearray(raw.numpy()), _dtype(x)).reshape(x["shape"])

    def scalar(self, x: dict[str, Any]) -> Any:
        return np.frombuffer(base64.b64decode(x["$scalar"], validate=True), _dtype(x))[0]

    def wrapper(self, x: dict[str, Any]) -> torch.Tensor:
        kind = wrapper_named(*x["$wrapper"])
        inner = {name: self.decode(part) for name, part in x["tensors"].items()}
        made = kind.__tensor_unflatten__(
            inner, self.decode(x["context"]), torch.Size(x["shape"]), tuple(x["stride"])
        )
        if not isinstance(made, torch.Tensor):
            raise ValueError(f"{kind.__qualname__} made no tensor")
        return made

    def pairs(self, x: list[Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(k), self.decode(v)) for k, v in x]


def _permuted(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """An empty tensor like ``x`` of another order in memory, which must have no gaps."""
    if len(stride) != x.dim() or any(s < 0 for s in stride):
        raise ValueError(f"stride {stride} does not fit shape {tuple(x.shape)}")
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, stride, strict=True))
    if x.numel() and reach != x.numel():
        raise ValueError(f"stride {stride} leaves gaps in shape {tuple(x.shape)}")
    return torch.empty_strided(x.shape, stride, dtype=x.dtype)


def _dtype(x: dict[str, Any]) -> np.dtype[Any]:
    if not _NUMPY_DTYPE.fullmatch(x["dtype"]):
        raise ValueError(f"no NumPy dtype: {x['dtype']!r}")
    dtype: np.dtype[Any] = np.dtype(x["dtype"])
    return dtype


def _float(bits: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


_TAGS: dict[str, Callable[[_Decoder, dict[str, Any]], Any]] = {
    "$tensor": _Decoder.tensor,
    "$shard": lambda d, x: d._tensors[x["$shard"]],
    "$wrapper": _Decoder.wrapper,
    "$ndarray": _Decoder.array,
    "$scalar": _Decoder.scalar,
    "$int": lambda _, x: int(x["$int"], 16),
    "$float": lambda _, x: _float(x["$float"]),
    "$complex": lambda _, x: complex(*(_float(part) for part in x["$complex"])),
    "$bytes": lambda _, x: base64.b64decode(x["$bytes"], validate=True),
    "$dtype": lambda _, x: BY_NAME[x["$dtype"]],
    "$device": lambda _, x: torch.device(x["$device"]),
    "$size": lambda _, x: torch.Size(x["$size"]),
    "$tuple": lambda d, x: tuple(d.decode(v) for v in x["$tuple"]),
    "$set": lambda d, x: {d.decode(v) for v in x["$set"]},
    "$frozenset": lambda d, x: frozenset(d.decode(v) for v in x["$frozenset"]),
    "$dict": lambda d, x: dict(d.pairs(x["$dict"])),
    "$ordered": lambda d, x: OrderedDict(d.pairs(x["$ordered"])),
    "$counter": lambda d, x: Counter(dict(d.pairs(x["$counter"]))),
}
