"""The live-storage meter: bytes of the storages that some tensor still holds, fake or real."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from actckpt.data.graph import Category
from actckpt.profiler.census import storages
from actckpt.profiler.lives import Lives
from actckpt.tracing.parts import is_shell
from actckpt.tracing.stand_in import StandIn, allocated_bytes


class _Live(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, with what is known of it."""

    __slots__ = ("bytes", "category", "id", "key")

    id: int
    key: int
    bytes: int
    category: Category


class LiveMeter:
    """Follows storages from first sight to death, and the highest sum of their bytes.

    A dispatch mode registers every operation's outputs, and in advance what is resident. PyTorch
    keeps one Python object per storage for as long as the storage lives, even when only C++ holds
    it, so the object's identity names the storage and a weak reference to it sees it die.

    Attributes:
        level_bytes: bytes of the registered storages that are alive.
        peak_bytes: highest level, with an operation's workspace where `note` gave one.
        levels: ``level_bytes`` by category.
        peak_levels: ``levels`` at the peak; with ``peak_workspace_bytes`` they sum to the peak.
        on_death: called with the id of each storage that dies, after the level went down.
    """

    def __init__(
        self,
        device_type: str = "cpu",
        on_death: Callable[[int], None] | None = None,
        stand_in: StandIn | None = None,
        lives: Lives | None = None,
    ) -> None:
        """
        Args:
            device_type: only tensors on such a device count; fake tensors by the device they claim.
            stand_in: the accelerator that they stand for, whose allocator rounds sizes up.
            lives: takes down when each storage lived.
        """
        self.device_type = device_type
        self.on_death = on_death
        self.stand_in = stand_in
        self.lives = lives
        self.level_bytes = 0
        self.levels = dict.fromkeys(Category, 0)
        self.peak_bytes = 0
        self.peak_levels = dict(self.levels)
        self.peak_workspace_bytes = 0
        self._live: dict[int, _Live] = {}
        self._occupied: dict[int, tuple[int, Category]] = {}
        self._next = 0

    def register(
        self, tensor: torch.Tensor, category: Category = Category.ACTIVATION
    ) -> int | None:
        """The id of the tensor's storage, which counts from now on until it dies.

        A known storage keeps its category, and is counted anew if it was resized. Of a wrapper
        subclass or sparse tensor the parts are registered, and the id is the first part's.

        Returns:
            None if the tensor is on another device or has no storage.
        """
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return self._register_parts(tensor, category)
        live = self._live.get(id(storage))
        if live is not None:
            size = self._size(storage)
            if size != live.bytes:
                self._resize(live, size)
            return live.id
        if tensor.device.type != self.device_type:
            return None
        if is_shell(tensor):
            return self._register_parts(tensor, category)
        return self._add(storage, category)

    def id_of(self, tensor: torch.Tensor) -> int | None:
        """The id of the tensor's storage if it was registered and is alive, else None."""
        for storage in storages(tensor):
            live = self._live.get(id(storage))
            return None if live is None else live.id
        return None

    def bytes_of(self, storage: int) -> int:
        """Bytes of a living storage, by id; 0 if it died. Linear in the living storages."""
        return next((live.bytes for live in self._live.values() if live.id == storage), 0)

    def move(self, tensor: torch.Tensor, category: Category) -> None:
        """Puts a registered tensor's bytes under another category (a gradient, once it is one)."""
        for storage in storages(tensor):
            live = self._live.get(id(storage))
            if live is not None:
                self.levels[live.category] -= live.bytes
                self.levels[category] += live.bytes
                live.category = category
                if self.lives is not None:
                    self.lives.moved(live.id, category)

    def note(self, workspace_bytes: int = 0) -> None:
        """Records the level with ``workspace_bytes`` of scratch on top, as of an operation."""
        level = self.level_bytes + workspace_bytes
        if level > self.peak_bytes:
            self.peak_bytes = level
            self.peak_levels = self.levels.copy()
            self.peak_workspace_bytes = workspace_bytes

    def occupy(self, size_bytes: int, category: Category = Category.ACTIVATION) -> int:
        """Counts memory that no tensor holds, as allocated, until `vacate`; returns its id."""
        found = self._next
        self._next += 1
        self._occupied[found] = (size_bytes, category)
        self.level_bytes += size_bytes
        self.levels[category] += size_bytes
        if self.lives is not None:
            self.lives.born(found, category)
            self.lives.resized(found, size_bytes)
        return found

    def vacate(self, occupied: int) -> None:
        """Ends what `occupy` began, by its id."""
        size_bytes, category = self._occupied.pop(occupied)
        self.level_bytes -= size_bytes
        self.levels[category] -= size_bytes
        if self.lives is not None:
            self.lives.died(occupied)

    def refresh(self) -> None:
        """Reads every living storage's size again, for resizes that no operation's output shows."""
        for live in list(self._live.values()):
            storage = live()
            if storage is not None and self._size(storage) != live.bytes:
                self._resize(live, self._size(storage))

    def reset_peak(self) -> None:
        """Begins a new peak at the present level."""
        self.peak_bytes = 0
        self.note()

    def close(self) -> None:
        """Forgets every storage; deaths are no longer reported."""
        self._live.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, storage: torch.UntypedStorage, category: Category) -> int:
        live = _Live(storage, self._died)
        live.id = self._next
        live.key = id(storage)
        live.bytes = 0
        live.category = category
        self._next += 1
        self._live[live.key] = live
        if self.lives is not None:
            self.lives.born(live.id, category)
        self._resize(live, self._size(storage))
        return live.id

    def _size(self, storage: torch.UntypedStorage) -> int:
        return allocated_bytes(storage.nbytes(), self.device_type, self.stand_in)

    def _register_parts(self, tensor: torch.Tensor, category: Category) -> int | None:
        if tensor.device.type != self.device_type:
            return None
        ids = []
        for storage in storages(tensor):
            live = self._live.get(id(storage))
            ids.append(self._add(storage, category) if live is None else live.id)
        return ids[0] if ids else None

    def _resize(self, live: _Live, size: int) -> None:
        self.level_bytes += size - live.bytes
        self.levels[live.category] += size - live.bytes
        live.bytes = size
        if self.lives is not None:
            self.lives.resized(live.id, size)
        self.note()

    def _died(self, live: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(live, _Live)
        if self._live.pop(live.key, None) is None:
            return
        self.level_bytes -= live.bytes
        self.levels[live.category] -= live.bytes
        if self.lives is not None:
            self.lives.died(live.id)
        if self.on_death is not None:
            self.on_death(live.id)
