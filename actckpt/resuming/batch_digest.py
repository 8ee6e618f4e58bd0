"""A digest of a batch, by which two runs can tell whether they read the same.

What is read of a batch: a tensor or array of up to 64 KiB whole; of a larger one 64 KiB, one word
of 8 bytes out of each of 8,192 equal stretches, each at another place of its stretch; other plain
data whole. So the cost is bounded per tensor, and no sample of a batch of up to 8,192 is left out
unread. Nothing waits for a device: of a tensor that lies on one, only dtype and shape are read.
Where a digest has to tell any two values apart (``whole``), tensors are read whole and waited for.
"""

from __future__ import annotations

import dataclasses
import functools
import marshal
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
import xxhash

WHOLE_BYTES = 64 * 1024
_WORD_BYTES = 8
_STRETCHES = WHOLE_BYTES // _WORD_BYTES
_DEPTH = 32  # of containers within containers
# containers and objects to look into: what refers to itself by many ways has no end of paths
MOST_OBJECTS = 1_000_000

# what `marshal` writes the same in every process, where nothing else lies within
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
# where a part of a batch lies: the keys that lead there
Keys = tuple[Any, ...]

_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_OF_NUMPY = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
}


@dataclasses.dataclass(frozen=True, slots=True)
class BatchDigest:
    """What was read of a batch.

    Args:
        text: 16 hexadecimal digits, the same in every process.
        omitted: the parts whose values are not in it, and why: "[0]: on cuda:0".
        opaque: of those, what is not code: values that may change unseen.
    """

    text: str
    omitted: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()


def _none_apart(x: Any) -> bool:
    return False


def batch_digest(
    batch: Any,
    *,
    whole: bool = False,
    most_objects: int = MOST_OBJECTS,
    apart: Callable[[Any], bool] = _none_apart,
) -> BatchDigest:
    """The digest of a batch: nested containers of tensors, arrays and plain data.

    Of another object its attributes are read, or its repr where that does not tell an address.

    Args:
        whole: tensors are read whole, and copied from the devices that they lie on; of objects that
            can be called, the attributes are read.
        most_objects: containers and objects to look into; the others are omitted.
        apart: of which objects only the class is read; asked for each that is no plain data.
    """
    reading = _Reading(whole, most_objects, apart)
    reading.read(batch, ())
    return BatchDigest(reading.hash.hexdigest(), tuple(reading.omitted), tuple(reading.opaque))


class _Reading:
    """One walk over a batch."""

    def __init__(self, whole: bool, most_objects: int, apart: Callable[[Any], bool]) -> None:
        self.hash = xxhash.xxh3_64()
        self.omitted: list[str] = []
        self.opaque: list[str] = []
        self._whole = whole
        self._most = most_objects
        self._left = most_objects
        self._apart = apart
        # ids of the containers that the one being read lies in
        self._around: set[int] = set()

    def read(self, x: Any, path: Keys) -> None:
        """Adds ``x``, which lies at ``path``."""
        if type(x) in _PLAIN:
            self.hash.update(marshal.dumps(x, 2))
        elif isinstance(x, torch.Tensor):
            self._read_tensor(x, path)
        elif isinstance(x, np.ndarray | np.generic):
            self._read_array(np.asarray(x), path)
        elif isinstance(x, bytearray | memoryview):
            self._read_array(np.frombuffer(x, np.uint8), path)
        elif isinstance(x, Enum):
            self._begin("enum", x.__class__.__qualname__, x.name)
        elif self._apart(x):
            self._begin("apart", type(x).__qualname__)
        elif id(x) in self._around:
            self._omit(path, "contains itself")
        elif len(path) > _DEPTH:
            self._omit(path, f"deeper than {_DEPTH} containers")
        elif self._left <= 0:
            if not self._left:  # said once
                self._omit(path, f"beyond {self._most:,} objects")
            self._left = -1
        else:
            self._left -= 1
            self._around.add(id(x))
            self._read_container(x, path)
            self._around.discard(id(x))

    def _omit(self, path: Keys, why: str, *, is_code: bool = False) -> None:
        text = f"batch{''.join(f'[{key!r:.40}]' for key in path)}: {why}"
        self.omitted.append(text)
        if not is_code:
            self.opaque.append(text)

    def _begin(self, *what: object) -> None:
        self.hash.update("|".join(map(str, what)).encode("utf-8", "surrogatepass"))

    def _read_container(self, x: Any, path: Keys) -> None:
        if isinstance(x, list | tuple):
            self._begin("list", len(x))
            # one call in place of thousands for the numbers of a tokenized text
            if len(x) > 1 and type(x) in (list, tuple) and _PLAIN.issuperset(map(type, x)):
                self.hash.update(marshal.dumps(tuple(x), 2))
                return
            for n, item in enumerate(x):
                self.read(item, (*path, n))
        elif isinstance(x, Mapping):
            self._begin("mapping", len(x))
            for key, value in x.items():
                self.read(key, (*path, "a key"))
                self.read(value, (*path, key))
        elif isinstance(x, set | frozenset):
            self._begin("set", len(x), *sorted(self._text_of(item, path) for item in x))
        elif dataclasses.is_dataclass(x) and not isinstance(x, type):
            fields = [(f.name, getattr(x, f.name, None)) for f in dataclasses.fields(x)]
            self._read_attributes(x, fields, path)
        else:
            self._read_other(x, path)

    def _text_of(self, item: Any, path: Keys) -> str:
        """The digest of an item of a set alone: they come in any order."""
        outer, self.hash = self.hash, xxhash.xxh3_64()
        self.read(item, (*path, "an item"))
        inner, self.hash = self.hash, outer
        return inner.hexdigest()

    def _read_attributes(self, x: Any, attributes: Iterable[tuple[str, Any]], path: Keys) -> None:
        self._begin("object", type(x).__qualname__)
        for name, value in attributes:
            self._begin(name)
            self.read(value, (*path, name))

    def _read_other(self, x: Any, path: Keys) -> None:
        kind: Any = type(x)
        # what can be called may count its calls
        has_state = self._whole and not isinstance(x, _CODE) and bool(getattr(x, "__dict__", None))
        if isinstance(x, Callable | type) and not has_state:  # type: ignore[arg-type]
            self._begin(getattr(x, "__qualname__", kind.__qualname__))
            self._omit(path, f"code of {kind.__qualname__}", is_code=True)
        elif callable(pixels := getattr(x, "tobytes", None)) and hasattr(x, "size"):
            self._begin("bytes", kind.__qualname__, x.size)  # an image
            self.read(np.frombuffer(pixels(), np.uint8), path)
        elif attributes := getattr(x, "__dict__", None):
            self._read_attributes(x, attributes.items(), path)
        elif kind.__repr__ is not object.__repr__ and " at 0x" not in (text := repr(x)):
            self._begin("repr", text)
        else:
            self._begin("object", kind.__qualname__)
            self._omit(path, f"a {kind.__qualname__}, whose values cannot be read")

    def _read_tensor(self, x: torch.Tensor, path: Keys) -> None:
        self._begin("tensor", x.dtype, x.layout)
        if type(x) not in _TENSORS and hasattr(x, "__tensor_flatten__"):
            names, context = x.__tensor_flatten__()
            self._begin(type(x).__qualname__)
            self.read(context, (*path, "context"))
            self._read_attributes(x, [(n, getattr(x, n)) for n in names], path)
            return
        if x.layout in _PARTS:
            self._begin(tuple(x.shape))
            for n, part in enumerate(_PARTS[x.layout](x.detach())):
                self.read(part, (*path, n))
            return
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            self._omit(path, f"a {_kind(x)} tensor")
            return
        self._begin(tuple(x.shape))
        if x.is_meta or (x.device.type != "cpu" and not self._whole):
            self._omit(path, f"on {x.device}")
            return
        try:
            x = x.detach().resolve_conj().resolve_neg()
            self._read_bytes(_all(x.cpu()) if self._whole else _sample(x))
        except (RuntimeError, TypeError) as error:  # a class that has no memory to look into
            self._omit(path, f"{type(x).__qualname__}: {error!s:.80}")

    def _read_array(self, x: np.ndarray[Any, Any], path: Keys) -> None:
        self._begin("array", x.dtype, x.shape)
        if x.dtype.hasobject:
            if x.dtype == np.dtype(object):
                self.read(x.ravel().tolist(), path)
            else:
                self._omit(path, f"an array of {x.dtype!s:.60}")
            return
        if self._whole or x.nbytes <= WHOLE_BYTES:
            self._read_bytes(np.ascontiguousarray(x).reshape(-1))
        elif x.flags.c_contiguous:
            self._read_bytes(_words_of(x.reshape(-1).view(np.uint8)))
        else:
            self._read_bytes(x.flat[_places(x.size, x.size // _STRETCHES or 1)])

    def _read_bytes(self, x: np.ndarray[Any, Any]) -> None:
        if x.size:
            self.hash.update(x.view(np.uint8).data)


def _all(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """A strided tensor in memory."""
    flat = x.contiguous().reshape(-1)
    return (flat if flat.dtype in _OF_NUMPY else flat.view(torch.uint8)).numpy()


def _sample(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a strided tensor in memory that are read."""
    if x.numel() * x.element_size() <= WHOLE_BYTES:
        return _all(x)
    if not x.is_contiguous():
        # without a copy of the whole: the elements at so many places
        places = _places(x.numel(), x.numel() // _STRETCHES or 1)
        index = np.unravel_index(places, tuple(x.shape))
        return x[tuple(map(torch.from_numpy, index))].view(torch.uint8).numpy()
    return _words_of(x.reshape(-1).view(torch.uint8).numpy())


def _words_of(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One word out of each stretch, and the bytes behind the last whole word."""
    count = flat.size // _WORD_BYTES
    words = flat[: count * _WORD_BYTES]
    aligned = words.view(np.uint64) if flat.ctypes.data % _WORD_BYTES == 0 else None
    places = _places(count, count // _STRETCHES)
    if aligned is None:
        chosen = words.reshape(count, _WORD_BYTES)[places].reshape(-1)
    else:
        chosen = aligned[places].view(np.uint8)
    return np.concatenate([chosen, flat[count * _WORD_BYTES :]])


@functools.lru_cache(maxsize=16)
def _places(count: int, stretch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A place in each stretch of so many: scattered, for rows often begin alike (padding)."""
    stretches = np.arange(count // stretch, dtype=np.int64)
    return stretches * stretch + (stretches * 2654435761 & 0x7FFFFFFF) % stretch


def _kind(x: torch.Tensor) -> str:
    return "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)


def _rows(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.crow_indices(), x.col_indices(), x.values()]


def _columns(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.ccol_indices(), x.row_indices(), x.values()]


_PARTS: dict[torch.layout, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    torch.sparse_coo: lambda x: [x._indices(), x._values()],
    torch.sparse_csr: _rows,
    torch.sparse_bsr: _rows,
    torch.sparse_csc: _columns,
    torch.sparse_bsc: _columns,
}
