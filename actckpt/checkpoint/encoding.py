"""A nested Python state as strict JSON and named tensors. What is neither is refused, by its key.

JSON stands for itself; whatever JSON has not is an object whose first member begins with ``$``:
``{"$tensor": name}``, ``{"$float": bits}``. `actckpt.checkpoint.decoding` is the inverse.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actckpt.checkpoint.dtypes import BY_NAME, name_of
from actckpt.checkpoint.wrappers import is_wrapper
from actckpt.errors import CheckpointSaveError

# deeper than any real state, shallower than what a JSON parser gives up on
MAX_DEPTH = 100
# the name that the safetensors format keeps for itself
_RESERVED = "__metadata__"
_JSON_INT = 2**63


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a tensor is here.

    Args:
        shape: of the whole tensor.
        offset: where the part begins in it.
        whole: the distributed tensor, of torch's class.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    whole: Any


@dataclass(frozen=True, slots=True)
class Encoded:
    """One item of a state: ``tree`` is JSON data that refers to ``tensors`` by name.

    The tensors are the state's own, not copies; those with an entry in ``shards`` are parts. Those
    in ``frozen`` may be such as no step changes: True is said to be, of False it is to be seen.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]
    shards: Mapping[str, Shard] = field(default_factory=dict)
    frozen: Mapping[str, bool] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.numel() * t.itemsize for t in self.tensors.values())


def encode(state: Any, where: str, *, sharded: bool = False) -> Encoded:
    """``state`` as JSON and tensors.

    Dicts keep their order and the types of their keys. Tensors that are the same window on the
    same storage are stored once, and are one tensor when decoded.

    Args:
        where: name of the state, for messages.
        sharded: of distributed tensors this process's part is taken; otherwise they are refused.

    Raises:
        CheckpointSaveError: something in it can be saved in neither way; the message has its key.
    """
    encoder = _Encoder(sharded)
    tree = encoder.encode(state, (where,))
    return Encoded(tree, encoder.tensors, encoder.shards)


class _Encoder:
    def __init__(self, sharded: bool) -> None:
        self._sharded = sharded
        self.tensors: dict[str, torch.Tensor] = {}
        self.shards: dict[str, Shard] = {}
        self._seen: dict[tuple[Any, ...], str] = {}

    def encode(self, x: Any, path: tuple[Any, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise CheckpointSaveError(
                f"{_shown(path[:8])}… is nested more than {MAX_DEPTH} deep, or contains itself"
            )
        kind = type(x)
        if x is None or kind is bool:
            return x
        if kind is str:
            return x
        if kind is int:
            return x if -_JSON_INT <= x < _JSON_INT else {"$int": hex(x)}
        if kind is float:
            return x if math.isfinite(x) else {"$float": _bits(x)}
        if isinstance(x, torch.Tensor):
            return self._tensor(x, path)
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(x, path)
        if kind is list:
            return [self.encode(v, (*path, i)) for i, v in enumerate(x)]
        if kind is tuple:
            return {"$tuple": [self.encode(v, (*path, i)) for i, v in enumerate(x)]}
        if kind is torch.Size:
            return {"$size": list(x)}
        if kind in (set, frozenset):
            members = [self.encode(v, (*path, "{}")) for v in x]
            return {f"${kind.__name__}": sorted(members, key=repr)}
        return self._leaf(x, path)

    def _leaf(self, x: Any, path: tuple[Any, ...]) -> Any:
        kind = type(x)
        if kind is bytes:
            return {"$bytes": base64.b64encode(x).decode("ascii")}
        if kind is complex:
            return {"$complex": [_bits(x.real), _bits(x.imag)]}
        if kind is torch.dtype and name_of(x) in BY_NAME:
            return {"$dtype": name_of(x)}
        if kind is torch.device:
            return {"$device": str(x)}
        if kind is np.ndarray:
            name = self._named(self._array(x, path), path)
            return {"$ndarray": name, "dtype": x.dtype.str, "shape": list(x.shape)}
        if isinstance(x, np.generic) and not x.dtype.hasobject and x.dtype.names is None:
            return {
                "$scalar": base64.b64encode(x.tobytes()).decode("ascii"),
                "dtype": x.dtype.str,
            }
        raise _refused(x, path)

    def _mapping(self, x: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
        tag = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}[type(x)]
        if tag == "$dict" and all(type(k) is str and not k.startswith("$") for k in x):
            return {k: self.encode(v, (*path, k)) for k, v in x.items()}
        return {tag: [[self._key(k, path), self.encode(v, (*path, k))] for k, v in x.items()]}

    def _key(self, key: Any, path: tuple[Any, ...]) -> Any:
        if key is None or type(key) in (str, int, float, bool, bytes):
            return self.encode(key, path)
        if type(key) is tuple:
            return {"$tuple": [self._key(k, path) for k in key]}
        raise CheckpointSaveError(
            f"{_shown(path)} has a key of type {type(key).__name__}: {key!r:.80}. A checkpoint "
            "holds keys that are str, int, float, bool, None, bytes or tuples of them"
        )

    def _wrapper(self, x: Any, path: tuple[Any, ...]) -> Any:
        """A tensor that is made of others, and says how."""
        names, context = x.__tensor_flatten__()
        kind = type(x)
        return {
            "$wrapper": [kind.__module__, kind.__qualname__],
            "tensors": {n: self.encode(getattr(x, n), (*path, n)) for n in names},
            "context": self.encode(context, (*path, "context")),
            "shape": list(x.shape),
            "stride": list(x.stride()),
        }

    def _shard(self, x: Any, path: tuple[Any, ...]) -> Any:
        """A distributed tensor, which says itself which part of it is here."""
        try:
            (box,) = x.__create_chunk_list__()
        except (RuntimeError, ValueError) as error:
            raise CheckpointSaveError(
                f"{_shown(path)} is a {type(x).__name__} whose part here is no box of the whole: "
                f"{error}. Redistribute it, or leave it out of the state"
            ) from error
        local = x.detach().to_local()
        if reason := _unstorable(local):
            raise CheckpointSaveError(f"{_shown(path)} is made of {reason}")
        # empty parts have no address, and tied weights must have one name on every rank
        window = ("shard", local.untyped_storage()._cdata, local.storage_offset(), x.dtype, x.shape)
        name = self._seen.get(window)
        if name is None:
            offset = tuple(box.offsets)
            if not x.numel():
                # cut along another dimension no rank's part is the whole, and somebody has to say
                # that there is this tensor
                local, offset = local.new_empty(x.shape), (0,) * x.dim()
            name = self._seen[window] = self._named(local, path)
            self.shards[name] = Shard(tuple(x.shape), offset, x)
        return {"$shard": name, "placements": [str(p) for p in x.placements]}

    def _tensor(self, x: torch.Tensor, path: tuple[Any, ...]) -> Any:
        if self._sharded and hasattr(x, "__create_chunk_list__"):
            return self._shard(x, path)
        if is_wrapper(type(x)):
            return self._wrapper(x, path)
        if reason := _unstorable(x):
            raise CheckpointSaveError(f"{_shown(path)} is {reason}")
        x = x.detach()
        window = (x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.dtype, x.shape,
                  x.stride(), x.is_conj(), x.is_neg())  # fmt: skip
        name = self._seen.get(window) if x.numel() else None
        if name is None:
            name = self._seen[window] = self._named(x, path)
        if x.is_contiguous() or not _dense(x):
            return {"$tensor": name}
        return {"$tensor": name, "stride": list(x.stride())}

    def _array(self, x: np.ndarray[Any, Any], path: tuple[Any, ...]) -> torch.Tensor:
        if x.dtype.hasobject or x.dtype.names is not None:
            raise _refused(x, path)
        return torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8) if x.nbytes else (
            torch.empty(0, dtype=torch.uint8)
        )  # fmt: skip

    def _named(self, x: torch.Tensor, path: tuple[Any, ...]) -> str:
        plain = "/".join(str(part) for part in path[1:]) or "value"
        name, copy = plain, 1
        # the keys 0 and "0", or "a/b" and "a" then "b"
        while name in self.tensors or name == _RESERVED:
            copy += 1
            name = f"{plain}#{copy}"
        self.tensors[name] = x
        return name


def _unstorable(x: torch.Tensor) -> str:
    """Why a tensor cannot be stored, as what it is; "" if it can."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return (
            f"a {type(x).__name__}, a tensor whose data is not all here or not plain; "
            "save its full plain tensor instead"
        )
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}; save its dense form, or its indices and values"
    if x.is_meta:
        return "a meta tensor, which has no data; materialize the model first"
    if x.is_quantized or name_of(x.dtype) not in BY_NAME:
        return f"a tensor of {x.dtype}; save its integer representation, scale and zero point"
    return ""


def _dense(x: torch.Tensor) -> bool:
    """Whether its elements fill a block of memory without gaps or overlaps, in some order."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda d: d[1]):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _bits(x: float) -> str:
    """The bits of a float, so that even a NaN comes back the same."""
    return struct.pack(">d", x).hex()


def _shown(path: tuple[Any, ...]) -> str:
    head, *keys = path
    return str(head) + "".join(f"[{key!r}]" for key in keys)


def _refused(x: Any, path: tuple[Any, ...]) -> CheckpointSaveError:
    return CheckpointSaveError(
        f"{_shown(path)} is a {type(x).__module__}.{type(x).__qualname__}: {x!r:.80}. A checkpoint "
        "holds tensors, numbers, strings, bytes, None, NumPy arrays, and dicts, lists, tuples and "
        "sets of them: convert it, or leave it out of the state"
    )
