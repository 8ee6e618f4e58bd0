"""Allocator truth: what a block of code really allocated, scratch inside kernels included."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from actckpt.profiler.census import storages
from actckpt.profiler.quiet import quiet_profiler


@dataclass(frozen=True, slots=True)
class Segment:
    """Levels between two marks of a meter, in bytes above the level at entry."""

    start_bytes: int
    peak_bytes: int
    end_bytes: int


class AllocatorMeter:
    """Measures the bytes that a block of code holds in a device's allocator.

    On CPU it reads what torch's profiler logs of torch's own CPU allocator, some 15 us per
    operation, on the calling thread and on those that inherit its state (autograd's). Only blocks
    whose allocation or owner was seen count: a storage that existed at entry and is released in
    the block counts if a Python tensor held it at entry, else it is taken as still allocated.
    Meters do not nest, and exclude any other torch profiler. On CUDA it resets the allocator's
    peak statistics and synchronises at both ends.

    Attributes:
        peak_bytes: highest level above the one at entry, at least 0.
        end_bytes: level at exit relative to entry; negative if the block released more.
        reserved_bytes: CUDA: highest bytes that the caching allocator held from the driver, as an
            absolute number; None on CPU.
        timeline: CPU: the level after every allocation and release, in bytes; () on CUDA.
        segments: what happened between entry, each `mark`, and exit.
    """

    def __init__(self, device: str | torch.device = "cpu", *, residents: bool = True) -> None:
        """
        Args:
            residents: CPU: look up the tensors that exist at entry, so that their release counts;
                takes time with the number of Python objects alive, some 60 ms.
        """
        self.device = torch.device(device)
        self.peak_bytes = 0
        self.end_bytes = 0
        self.reserved_bytes: int | None = None
        self.timeline: tuple[int, ...] = ()
        self.segments: tuple[Segment, ...] = ()
        self._meter: _CpuLog | _CudaStatistics
        if self.device.type == "cpu":
            self._meter = _CpuLog(residents)
        elif self.device.type == "cuda":
            self._meter = _CudaStatistics(self.device)
        else:
            raise ValueError(f"no allocator statistics for {self.device}; use cpu or cuda")

    def mark(self) -> None:
        """Ends the current segment and begins the next."""
        self._meter.mark()

    def __enter__(self) -> Self:
        self._meter.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._meter.stop()
        self.timeline = self._meter.timeline
        self.segments = tuple(self._meter.segments)
        self.reserved_bytes = self._meter.reserved_bytes
        self.peak_bytes = max(s.peak_bytes for s in self.segments)
        self.end_bytes = self.segments[-1].end_bytes


class _CudaStatistics:
    timeline: tuple[int, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self._start = 0
        self.reserved_bytes = 0
        self.segments: list[Segment] = []

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._base = torch.cuda.memory_allocated(self._device)
        self._start = 0
        self.reserved_bytes = 0
        self.segments = []

    def mark(self) -> None:
        # allocation happens on the host, but releases on side streams wait for events
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - self._base
        end = torch.cuda.memory_allocated(self._device) - self._base
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self._device))
        self.segments.append(Segment(self._start, peak, end))
        self._start = end
        torch.cuda.reset_peak_memory_stats(self._device)

    def stop(self) -> None:
        self.mark()


class _CpuLog:
    """Torch's profiler as an allocation log, with markers written into the log itself.

    A marker is a one-byte storage that stays alive: its address identifies its event, so that a
    mark, or the release of a block that the profiler never saw, has an exact place in the order.
    """

    reserved_bytes: int | None = None

    def __init__(self, residents: bool) -> None:
        self._residents = residents
        self.timeline: tuple[int, ...] = ()
        self.segments: list[Segment] = []
        self._profiler: Any = None
        self._watched: list[weakref.ref[torch.UntypedStorage]] = []
        self._markers: list[torch.UntypedStorage] = []
        self._meaning: dict[int, int | None] = {}
        self._running = False

    def start(self) -> None:
        self._markers = []
        self._meaning = {}
        if self._residents:
            self._watch_residents()
        unknown = torch.UntypedStorage(1)
        # profile() would also build Python events for every operation: only the log is needed
        self._profiler = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
        with quiet_profiler():
            self._profiler.__enter__()
            # torch warns at the first release of a block older than the profiler: let it be this
            del unknown
        self._running = True

    def mark(self) -> None:
        self._write(None)

    def stop(self) -> None:
        self._running = False
        self._watched.clear()
        self._markers.clear()
        with quiet_profiler():
            self._profiler.__exit__(None, None, None)
        results = self._profiler.kineto_results
        self._profiler = None
        self._read(_allocations(results))

    def _write(self, meaning: int | None) -> None:
        marker = torch.UntypedStorage(1)
        self._markers.append(marker)
        self._meaning[marker.data_ptr()] = meaning

    def _watch_residents(self) -> None:
        seen: set[int] = set()
        for thing in gc.get_objects():
            # type(), because isinstance would wake lazy proxies
            if not issubclass(type(thing), torch.Tensor):
                continue
            self._watch(thing, seen)
            if thing.requires_grad and thing.is_leaf and thing.grad is not None:
                self._watch(thing.grad, seen)  # often held by C++ alone

    def _watch(self, tensor: torch.Tensor, seen: set[int]) -> None:
        for storage in storages(tensor):
            # memory borrowed from NumPy or a file is not the allocator's, nor resizable
            if id(storage) in seen or storage.device.type != "cpu" or not storage.resizable():
                continue
            seen.add(id(storage))
            self._watched.append(weakref.ref(storage, self._gone(storage.nbytes())))

    def _gone(self, size: int) -> Any:
        def callback(_: object) -> None:
            if self._running:
                self._write(size)

        return callback

    def _read(self, events: list[tuple[int, int, int]]) -> None:
        level = start = peak = 0
        blocks: dict[int, int] = {}
        timeline = []
        # a marker outlives the session, so it is the last to have had its address
        last = {address: i for i, (_, address, size) in enumerate(events) if size > 0}
        self.segments = []
        for i, (_, address, size) in enumerate(events):
            if address in self._meaning and last.get(address) == i:
                meaning = self._meaning[address]
                if meaning is None:
                    self.segments.append(Segment(start, peak, level))
                    start = peak = level
                    continue
                level -= meaning
            elif size > 0:
                # an address that is handed out again was released where the profiler did not look
                level += size - blocks.pop(address, 0)
                blocks[address] = size
            else:
                # older blocks: either a marker tells, or the size that torch remembers is stale
                size = blocks.pop(address, 0)
                if not size:
                    continue
                level -= size
            peak = max(peak, level)
            timeline.append(level)
        self.segments.append(Segment(start, peak, level))
        self.timeline = tuple(timeline)


def _allocations(results: Any) -> list[tuple[int, int, int]]:
    """(time in ns, address, signed bytes) of all events of the CPU allocator, in order."""
    kind = torch._C._profiler._ExtraFields_Allocation
    found = []
    stack = list(results.experimental_event_tree())
    while stack:
        event = stack.pop()
        fields = event.extra_fields
        if isinstance(fields, kind):
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        else:
            stack.extend(event.children)
    found.sort(key=lambda e: e[0])
    return found
