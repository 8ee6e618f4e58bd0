"""A sample of a run's weights that moves on with every step, until all of them were in one.

Modules are read through `module._parameters`, so that what takes a parameter's place is read, too.
"""

from __future__ import annotations

import ctypes
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

# of what an optimizer may step on, and of all else: frozen parameters, persistent buffers
TRAINED_BYTES, TRAINED_PIECES = 48 << 10, 6
OTHER_BYTES, OTHER_PIECES = 16 << 10, 2
# what cannot be read: freed, without memory of its own, on a device that is slow to answer
UNREAD = "-" * 8
# samples whose copies from a device are under way at a time
UNDER_WAY = 8


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor, as it is found again at every step.

    Args:
        within: attributes that lead from the parameter to it, for tensors made of others.
    """

    label: str
    owner: Mapping[str, torch.Tensor | None]
    name: str
    within: tuple[str, ...]
    count: int
    itemsize: int

    def tensor(self) -> torch.Tensor | None:
        """As it is now."""
        found: Any = self.owner.get(self.name)
        for attribute in self.within:
            found = getattr(found, attribute, None)
        return found if isinstance(found, torch.Tensor) else None


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a weight, in the order of its memory."""

    weight: Weight
    begin: int
    end: int

    def __str__(self) -> str:
        whole = (self.begin, self.end) == (0, self.weight.count)
        return self.weight.label if whole else f"{self.weight.label}[{self.begin}:{self.end}]"


class Rotation:
    """The samples of some weights: each step's is bounded, and all of them cover everything.

    Args:
        limit_bytes, limit_pieces: of one sample. A weight that is larger is cut into samples of
            its own.
    """

    def __init__(self, weights: list[Weight], limit_bytes: int, limit_pieces: int) -> None:
        self._limit_bytes = limit_bytes
        self._groups: list[list[Weight]] = []
        # number of the first sample of each group
        self._begins: list[int] = []
        self.steps = 0
        room_bytes = room_pieces = 0
        for weight in weights:
            size_bytes = weight.count * weight.itemsize
            if size_bytes > room_bytes or not room_pieces:
                self._groups.append([])
                self._begins.append(self.steps)
                self.steps += max(1, math.ceil(weight.count / self._elements(weight)))
                room_bytes, room_pieces = limit_bytes, limit_pieces
            self._groups[-1].append(weight)
            room_bytes, room_pieces = room_bytes - size_bytes, room_pieces - 1

    def _elements(self, weight: Weight) -> int:
        return max(1, self._limit_bytes // weight.itemsize)

    def pieces(self, step: int) -> list[Piece]:
        """What is read at a step."""
        if not self.steps:
            return []
        number = step % self.steps
        group = bisect_right(self._begins, number) - 1
        weights = self._groups[group]
        if len(weights) > 1:
            return [Piece(w, 0, w.count) for w in weights]
        (weight,) = weights
        elements = self._elements(weight)
        begin = (number - self._begins[group]) * elements
        return [Piece(weight, begin, min(begin + elements, weight.count))]


class Sample:
    """Digests of some pieces, once copies from devices have come."""

    def __init__(self, rotation: str, pieces: list[Piece]) -> None:
        self.rotation = rotation
        self.pieces = pieces
        self._digests: list[str | None] = []
        self._copies: list[tuple[int, Any]] = []
        self._events: list[torch.cuda.Event] = []

    @property
    def ready(self) -> bool:
        """Whether everything is here; asks, and waits for nothing."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Returns once everything is here."""
        for event in self._events:
            event.synchronize()

    def digests(self) -> str:
        """Of all pieces, once `ready`."""
        for index, copy in self._copies:
            self._digests[index] = _digest(copy)
        self._copies.clear()
        return "".join(d or UNREAD for d in self._digests)

    def take(self, memory: torch.Tensor | None) -> None:
        """Reads the pieces as they are now.

        Args:
            memory: pinned, of a whole sample, for those that lie on a device.
        """
        used = 0
        devices = set()
        for piece in self.pieces:
            self._digests.append(None)
            tensor = piece.weight.tensor()
            if tensor is None or not _is_readable(tensor, piece.end):
                continue
            size_bytes = (piece.end - piece.begin) * tensor.element_size()
            if tensor.device.type == "cpu":
                at = tensor.data_ptr() + piece.begin * tensor.element_size()
                self._digests[-1] = _digest((ctypes.c_char * size_bytes).from_address(at))
            elif memory is not None and used + size_bytes <= memory.numel():
                window = memory[used : used + size_bytes]
                flat = tensor.detach().as_strided((tensor.numel(),), (1,))
                # on the stream of the next step, which can change nothing before
                window.copy_(flat[piece.begin : piece.end].view(torch.uint8), non_blocking=True)
                self._copies.append((len(self._digests) - 1, window.numpy()))
                devices.add(tensor.device)
                used += -(-size_bytes // 64) * 64
        self._events = [torch.cuda.current_stream(d).record_event() for d in devices]


class WeightSampler:
    """The samples of the weights of some modules.

    Args:
        modules: by the names that begin their weights' labels; "" for none.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._memory: deque[torch.Tensor] = deque()
        self._pins = False
        self.forget()

    def forget(self) -> None:
        """The modules may have other weights from now on, or train others."""
        self._rotations: tuple[Rotation, ...] | None = None
        self._name = ""

    @property
    def steps(self) -> int:
        """How many steps it takes until every weight was in a sample."""
        return max(1, *(r.steps for r in self._found()))

    def _found(self) -> tuple[Rotation, ...]:
        if self._rotations is not None:
            return self._rotations
        trained: list[Weight] = []
        others: list[Weight] = []
        name = xxhash.xxh3_64()
        seen: dict[int, torch.Tensor] = {}  # kept, or another could come to have the number of one
        for label, module in self._modules.items():
            for weight, tensor, is_trained in _weights(module, label):
                if id(tensor) in seen or not _has_memory(tensor):
                    continue
                seen[id(tensor)] = tensor
                self._pins |= tensor.is_cuda
                name.update(f"{weight.label} {tensor.dtype} {weight.count} {is_trained}\n".encode())
                (trained if is_trained else others).append(weight)
        self._rotations = (
            Rotation(trained, TRAINED_BYTES, TRAINED_PIECES),
            Rotation(others, OTHER_BYTES, OTHER_PIECES),
        )
        self._name = f"{name.intdigest() & 0xFFFFFFFF:08x}"
        return self._rotations

    def sample(self, step: int) -> Sample | None:
        """What belongs to a step, read now or under way; None where there is nothing to read."""
        pieces = [p for rotation in self._found() for p in rotation.pieces(step)]
        if not pieces:
            return None
        sample = Sample(self._name, pieces)
        sample.take(self._next_memory() if self._pins else None)
        return sample

    def _next_memory(self) -> torch.Tensor:
        """That of the oldest sample, which is given up if it is still under way."""
        if len(self._memory) < UNDER_WAY:
            # an aligned place for each piece
            size_bytes = TRAINED_BYTES + OTHER_BYTES + 64 * (TRAINED_PIECES + OTHER_PIECES)
            self._memory.append(torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True))
        else:
            self._memory.rotate(-1)
        return self._memory[-1]


def _weights(module: nn.Module, label: str) -> Iterator[tuple[Weight, torch.Tensor, bool]]:
    """Every parameter and persistent buffer, taken apart where it is made of other tensors."""
    for path, sub in module.named_modules(prefix=label):
        start = f"{path}." if path else ""
        for name, parameter in sub._parameters.items():
            if parameter is not None:
                for within, part in _parts(parameter, ()):
                    weight = _weight(start + name, sub._parameters, name, within, part)
                    yield weight, part, parameter.requires_grad
        for name, buffer in sub._buffers.items():
            if buffer is not None and name not in sub._non_persistent_buffers_set:
                for within, part in _parts(buffer, ()):
                    yield _weight(start + name, sub._buffers, name, within, part), part, False


def _weight(
    label: str,
    owner: Mapping[str, torch.Tensor | None],
    name: str,
    within: tuple[str, ...],
    tensor: torch.Tensor,
) -> Weight:
    label = ".".join([label, *within])
    return Weight(label, owner, name, within, tensor.numel(), tensor.element_size())


def _parts(
    tensor: torch.Tensor, within: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            # torch's distributed tensors name their mesh, too
            if isinstance(part := getattr(tensor, name), torch.Tensor):
                yield from _parts(part, (*within, name))
    else:
        yield within, tensor


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be read at all, now or later."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.numel() > 0
    )


def _is_readable(tensor: torch.Tensor, end: int) -> bool:
    """Whether its first ``end`` elements in memory are there, without gaps between them."""
    if not _has_memory(tensor) or end > tensor.numel():
        return False
    if not tensor.is_contiguous() and not _is_dense(tensor):
        return False
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return bool(tensor.untyped_storage().nbytes() >= needed)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie one beside the other, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _digest(data: Any) -> str:
    return f"{xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF:08x}"
