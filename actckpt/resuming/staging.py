"""Copies of a state that a writer can read while training goes on, in memory that is reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from actckpt.checkpoint.encoding import Encoded
from actckpt.errors import CheckpointSaveError
from actckpt.units import GIGABYTES

# windows begin where any dtype may, and vector instructions like it
_ALIGNMENT = 64

# whether only an optimizer step changes the tensor of this item and name
Steady = Callable[[str, str], bool]


@dataclass(slots=True)
class StagingSet:
    """Room for one state; it is somebody's until they say that they have read it."""

    buffer: torch.Tensor | None = None
    events: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Size of the memory that is held."""
        if self.buffer is None:
            return 0
        return _taken_bytes(self.buffer.numel(), pinned=self.buffer.is_pinned())

    def await_copies(self) -> None:
        """Returns once everything is here; on the CPU it already is."""
        for event in self.events:
            event.synchronize()


class Staging:
    """A few staging sets within a bound.

    On CUDA the memory is pinned and copies do not stop the processor. What only an optimizer step
    changes is copied on a stream beside the training's, which `guard` makes that step wait for;
    everything else on the training's own stream, before whatever could change it.

    Args:
        sets: states that can be held at a time.
        limit_bytes: of all sets together; None is no bound.
    """

    def __init__(self, sets: int, limit_bytes: int | None) -> None:
        self.sets = [StagingSet() for _ in range(sets)]
        self._limit_bytes = limit_bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._beside: list[torch.cuda.Event] = []

    @property
    def size_bytes(self) -> int:
        """Size of the memory that all sets hold."""
        return sum(s.size_bytes for s in self.sets)

    @property
    def copies_beside(self) -> bool:
        """Whether `guard` has something to wait for."""
        return bool(self._beside)

    def copy(
        self, items: Mapping[str, Encoded], into: StagingSet, steady: Steady
    ) -> dict[str, Encoded]:
        """The same items with tensors in the memory of a set, once `StagingSet.await_copies` ends.

        Raises:
            CheckpointSaveError: they need more than the bound, or than there is.
        """
        begins: dict[tuple[str, str], int] = {}
        end = 0
        for item, encoded in items.items():
            for name, tensor in encoded.tensors.items():
                begins[item, name] = begin = _aligned(end)
                end = begin + tensor.numel() * tensor.itemsize
        buffer = self._room(into, end, pinned=_any_on_cuda(items))
        dtypes = {t.dtype for encoded in items.values() for t in encoded.tensors.values()}
        typed = {dtype: buffer.view(dtype) for dtype in dtypes}
        staged: dict[str, Encoded] = {}
        beside: list[tuple[torch.Tensor, torch.Tensor]] = []
        devices = set()
        for item, encoded in items.items():
            windows: dict[str, torch.Tensor] = {}
            for name, tensor in encoded.tensors.items():
                window = windows[name] = _window(typed[tensor.dtype], begins[item, name], tensor)
                if not tensor.is_cuda:
                    window.copy_(tensor)
                    continue
                devices.add(tensor.device)
                if steady(item, name):
                    beside.append((window, tensor))
                else:
                    window.copy_(tensor, non_blocking=True)
            staged[item] = replace(encoded, tensors=windows)
        into.events = [torch.cuda.current_stream(d).record_event() for d in devices]
        self._copy_beside(beside)
        into.events += self._beside
        return staged

    def guard(self) -> None:
        """Makes the CUDA work that is queued from now on wait for the copies beside it."""
        events, self._beside = self._beside, []
        for event in events:
            # an event's device is that of the stream it was recorded on
            event.wait(torch.cuda.current_stream(event.device))

    def _room(self, into: StagingSet, size_bytes: int, *, pinned: bool) -> torch.Tensor:
        size_bytes = _aligned(size_bytes)  # whole elements of every dtype
        held = into.buffer
        if held is not None and held.numel() >= size_bytes:
            return held
        total = self.size_bytes - into.size_bytes + _taken_bytes(size_bytes, pinned=pinned)
        if self._limit_bytes is not None and total > self._limit_bytes:
            raise CheckpointSaveError(
                f"saving in the background needs {GIGABYTES.text(total)} of staging "
                f"memory; staging_gb allows {GIGABYTES.number(self._limit_bytes)}. Raise it, or "
                "save with background=False, which copies nothing"
            )
        into.buffer = None  # before the larger one exists
        try:
            buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
            # its pages exist from now on: no save after this one waits for them
            buffer.zero_()
        except RuntimeError as error:  # torch has no class for it on the CPU
            raise CheckpointSaveError(
                f"saving in the background needs {GIGABYTES.text(size_bytes)} of staging "
                f"memory, which cannot be had: {error}. Save with background=False, which copies "
                "nothing"
            ) from error
        into.buffer = buffer
        return buffer

    def _copy_beside(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for device in {tensor.device for _, tensor in pairs}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for window, tensor in pairs:
                    if tensor.device == device:
                        window.copy_(tensor, non_blocking=True)
                        # its memory must not be given away before it was read
                        tensor.record_stream(stream)
            self._beside.append(stream.record_event())


def _any_on_cuda(items: Mapping[str, Encoded]) -> bool:
    return any(t.is_cuda for encoded in items.values() for t in encoded.tensors.values())


def _taken_bytes(size_bytes: int, *, pinned: bool) -> int:
    """What a buffer takes: torch gets pinned memory in powers of two."""
    return 1 << (size_bytes - 1).bit_length() if pinned and size_bytes else size_bytes


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _window(memory: torch.Tensor, begin_bytes: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor in ``memory``, laid out as another one where that one has no gaps."""
    stride = like.stride()
    if not like.is_contiguous():
        # equal layouts are copied at the speed of memory
        stride = torch.empty_like(like, device="meta").stride()
    return memory.as_strided(like.shape, stride, begin_bytes // like.itemsize)
