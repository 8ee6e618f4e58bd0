"""Writes down every ATen operation, allocation and save of a step that runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from actckpt.data.graph import STATISTICS, Category, Op, Phase, Save, Storage, Value
from actckpt.tracing.fake import FakeWorld
from actckpt.tracing.mode import StepMode, flat_outputs, flat_tensors
from actckpt.tracing.parts import is_plain, parts
from actckpt.tracing.real_values import has_generator, know, real_of
from actckpt.tracing.stand_in import allocated_bytes


def is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers with these arguments."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout", "p"):
            value = kwargs.get(argument.name)
            if value is None and position < len(args):
                value = args[position]
            if value is not None and not isinstance(value, torch.Tensor) and value == 0:
                return False
    return True


# operations that change how a tensor lies on its storage, and no element: views, in truth
_LAYOUT_ONLY = ("aten::as_strided_", "aten::squeeze_", "aten::t_", "aten::transpose_",
                "aten::unsqueeze_")  # fmt: skip


def written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The arguments whose elements an operation changes in place."""
    if func._schema.name in _LAYOUT_ONLY:
        return
    if not func._schema.is_mutable:
        statistics = STATISTICS.get(str(func), ())
        if statistics and args[5]:  # in training
            yield from (args[n] for n in statistics if args[n] is not None)
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from flat_tensors((value,))


class _Lifetime:
    """A storage while it is being traced."""

    __slots__ = ("born", "bytes", "category", "died", "name", "ref", "settled")

    def __init__(self, size: int, category: Category, born: int, name: str) -> None:
        self.bytes = size
        self.category = category
        self.born = born
        self.died = -1
        self.name = name
        self.settled = -1
        self.ref: Any = None


class _Handle:
    """What autograd holds in place of a saved tensor: enough to make it again, and no memory."""

    __slots__ = ("__weakref__", "kept", "real", "save", "value")

    def __init__(self, save: int, value: int, tensor: torch.Tensor, kept: bool) -> None:
        self.save = save
        self.value = value
        self.kept = tensor.detach() if kept else None
        self.real = real_of(tensor)  # a mask's values are asked in backward, too


class Recorder(StepMode):
    """A dispatch mode above `FakeTensorMode`; its lists become the `Graph`.

    Saved activations are not held: backward gets a fresh fake of the same shape, under the same
    storage id. So a storage's death shows when everyone but autograd has let go of it.
    """

    def __init__(self, world: FakeWorld) -> None:
        super().__init__(world)
        self.phase = Phase.FORWARD
        self.stage_stack: list[int] = []
        self.refuse: Any = lambda reason: None
        self.storages: list[_Lifetime] = []
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.saves: list[list[Any]] = []
        self.signatures: dict[str, int] = {}
        self._ids: dict[int, int] = {}
        self._value_ids: dict[Value, int] = {}
        self._sequence: dict[int, int] = {}
        # storage -> the last operation that made or wrote it
        self._made_by: dict[int, int] = {}
        self._recreated: dict[int, Any] = {}
        self._finalizers: list[Any] = []
        self.recording = True
        # a forward that is run by a backward hook (cached losses) is within that node, and is no
        # autograd of its own
        self._around: Any = torch._C._current_autograd_node()

    # ---- storages and values

    def storage_id(
        self, tensor: torch.Tensor, category: Category = Category.ACTIVATION, name: str = "",
        born: int | None = None,
    ) -> int:  # fmt: skip
        """The id of a tensor's storage; an unseen one is entered as born now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._ids.get(key)
        if known is not None:
            return known
        if born is None:
            born = len(self.ops)
        size = allocated_bytes(storage.nbytes(), tensor.device.type, self.world.stand_in)
        life = _Lifetime(size, category, born, name)
        sid = len(self.storages)
        self.storages.append(life)
        self._watch(storage, sid)
        return sid

    def enter(
        self, tensor: torch.Tensor, category: Category = Category.ACTIVATION, name: str = "",
        born: int | None = None,
    ) -> None:  # fmt: skip
        """Enters the storages of a tensor, or of those that it is made of, that are unseen."""
        for part in parts(tensor):
            self.storage_id(part, category, name, born)

    def known_storage(self, tensor: torch.Tensor) -> int:
        """The id of a tensor's storage, or -1 if nothing was seen of it."""
        return self._ids.get(tensor.untyped_storage()._cdata, -1)

    def _watch(self, storage: torch.UntypedStorage, sid: int) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            self._ids.pop(key, None)
            self.storages[sid].died = max(self.storages[sid].died, len(self.ops))

        self._ids[key] = sid
        self.storages[sid].ref = weakref.ref(storage, gone)

    def value_id(self, tensor: torch.Tensor) -> int:
        """The id of a tensor's window on its storage."""
        strided = is_plain(tensor)
        value = Value(
            self.storage_id(tensor) if strided else -1,
            tuple(tensor.shape),
            tuple(tensor.stride()) if strided else (),
            int(tensor.storage_offset()) if strided else 0,
            str(tensor.dtype)[6:],
            str(tensor.device),
        )
        known = self._value_ids.get(value)
        if known is None:
            known = self._value_ids[value] = len(self.values)
            self.values.append(value)
        return known

    def seen_value(self, tensor: torch.Tensor) -> int:
        """As `value_id`, or -1 if no operation of the step has met the tensor's storage."""
        if not is_plain(tensor):
            return -1
        if not isinstance(tensor, FakeTensor):
            tensor = self.world.fake(tensor)
            self.constant(tensor)
        return self.value_id(tensor) if self.known_storage(tensor) >= 0 else -1

    # ---- operations

    def constant(self, fake: torch.Tensor) -> None:
        if self.recording:
            self.enter(fake, Category.CONSTANT, born=-1)

    def asked(self, tensor: torch.Tensor) -> None:
        """What made or wrote the number last is marked."""
        sid = self.known_storage(tensor)
        index = self._made_by.get(sid) if sid >= 0 else None
        if index is not None:
            self.ops[index] = replace(self.ops[index], asked=True)

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self.recording:
            self._record(func, args, kwargs, out)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = str(func)
        inputs = tuple(
            self.value_id(t) for t in (*flat_tensors(args), *flat_tensors(kwargs.values()))
        )
        count = len(self.storages)
        outputs = tuple(self.value_id(t) for t in flat_outputs(out))
        for t in flat_outputs(out):
            if not is_plain(t):
                self.enter(t)
        writes = tuple(
            {self.values[self.value_id(t)].storage: None for t in written(func, args, kwargs)}
        )
        results = out if isinstance(out, (list, tuple)) else (out,)
        owner, nested = -1, False
        node: Any = torch._C._current_autograd_node()
        if node is self._around:
            node = None
        if self.phase is Phase.BACKWARD:
            if node is not None:
                owner = self._sequence.get(node._sequence_nr(), -1)
        elif node is None:
            self._sequence[torch._C._autograd._get_sequence_nr() - 1] = len(self.ops)
        elif self.phase is not Phase.OPTIMIZER:  # which may step inside backward
            nested = True
            self.refuse("runs autograd in its forward")
        if has_generator(args, kwargs):
            self.refuse("draws from a generator of its own")
        text = self.signature(func, args, kwargs)
        view = len(self.storages) == count and not writes and bool(outputs)
        made = () if view else tuple(self.values[v].storage for v in outputs)
        self._made_by.update(dict.fromkeys((*writes, *made), len(self.ops)))
        self.ops.append(
            Op(
                name=name,
                stage=self.stage_stack[-1] if self.stage_stack else -1,
                phase=self.phase,
                inputs=inputs,
                outputs=outputs,
                writes=writes,
                random=is_random(func, args, kwargs),
                view=view,
                owner=owner,
                nested=nested,
                signature=self.signatures.setdefault(text, len(self.signatures)),
                plain=not isinstance(out, list)
                and all(isinstance(r, torch.Tensor) for r in results),
            )
        )

    def settle(self, gradient: torch.Tensor, name: str) -> None:
        """``gradient`` has become a parameter's ``.grad``."""
        if not is_plain(gradient):
            return
        life = self.storages[self.storage_id(gradient)]
        life.category = Category.GRADIENT
        life.name = name
        life.settled = len(self.ops)

    # ---- saved tensors

    def pack(self, tensor: torch.Tensor) -> _Handle:
        """Hook: autograd saves ``tensor``."""
        self.paused = True
        try:
            # autograd may save a real tensor that the operation itself met as a fake
            if not isinstance(tensor, FakeTensor):
                tensor = self.world.fake(tensor)
                self.constant(tensor)
            value = self.value_id(tensor)
        finally:
            self.paused = False
        sid = self.values[value].storage
        held = sid < 0 or self.storages[sid].category is not Category.ACTIVATION
        index = len(self.saves)
        stage = self.stage_stack[-1] if self.stage_stack else -1
        self.saves.append([len(self.ops), value, stage, -1, -1, held])
        handle = _Handle(index, value, tensor, held)

        def released() -> None:
            self._release(index)

        self._finalizers.append(weakref.finalize(handle, released))
        return handle

    def _release(self, index: int) -> None:
        self.saves[index][4] = max(self.saves[index][4], len(self.ops))

    def saved_bytes(self, first: int, last: int) -> int:
        """Activations that autograd saved from save ``first`` up to ``last``, each storage once."""
        saves = self.saves[first:last]
        storages = {self.values[value].storage for _, value, _, _, _, held in saves if not held}
        return sum(self.storages[n].bytes for n in storages)

    def unpack(self, handle: _Handle) -> torch.Tensor:
        """Hook: backward asks for a saved tensor."""
        save = self.saves[handle.save]
        if save[3] < 0:
            save[3] = len(self.ops)
        if handle.kept is not None:
            return handle.kept
        value = self.values[handle.value]
        dtype = getattr(torch, value.dtype)
        self.paused = True
        try:
            base_ref = self._recreated.get(value.storage)
            base = base_ref() if base_ref is not None else None
            if base is None or base.dtype != dtype:
                numel = self.storages[value.storage].bytes // dtype.itemsize
                base = self.fakes.fresh((numel,), (1,), dtype, torch.device(value.device))
                storage = base.untyped_storage()
                key, index = storage._cdata, handle.save
                self._ids[key] = value.storage

                def gone(_: Any) -> None:
                    self._ids.pop(key, None)
                    self._release(index)

                self._recreated[value.storage] = weakref.ref(base)
                self._finalizers.append(weakref.ref(storage, gone))
            window = self.fakes.window(
                base.untyped_storage(), value.shape, value.stride, value.offset, dtype, base.device
            )
            # the window keeps the base, so that later windows share its storage
            window.__dict__["_actckpt_base"] = base
            return know(window, handle.real)
        finally:
            self.paused = False

    # ---- the end

    def finish(self) -> tuple[tuple[Storage, ...], tuple[Save, ...]]:
        """Storages and saves once the step has ended; whatever still lives died at the end."""
        end = len(self.ops)
        for finalizer in self._finalizers:
            if isinstance(finalizer, weakref.finalize):
                finalizer.detach()
        storages = []
        for life in self.storages:
            alive = life.ref is not None and life.ref() is not None
            storages.append(
                Storage(
                    life.bytes,
                    life.category,
                    life.born,
                    end if alive else life.died,
                    life.name,
                    life.settled,
                )
            )
            life.ref = None
        saves = tuple(
            Save(at, value, stage, use, end if released < 0 else released, held)
            for at, value, stage, use, released, held in self.saves
        )
        return tuple(storages), saves
