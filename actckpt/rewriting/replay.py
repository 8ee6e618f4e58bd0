"""Runs a region's forward again, for the tensors that backward asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from actckpt.errors import ReplayError
from actckpt.rewriting.ambient import (
    autocast_contexts,
    generator_states,
    set_generator_states,
)
from actckpt.rewriting.changed import unread
from actckpt.rewriting.current import CURRENT
from actckpt.rewriting.holders import Dropped, is_resident, verify
from actckpt.rewriting.modes import Mismatch, PruneMode
from actckpt.rewriting.node import Node
from actckpt.rewriting.planned_module import PlannedModule
from actckpt.rewriting.record import CallRecord, Link, Span
from actckpt.tracing.call import tensors
from actckpt.tracing.fake import is_tracing
from actckpt.tracing.parametrized import caching, is_caching


class ChangedError(RuntimeError):
    """What autograd says of a tensor that was changed in place, of one that a replay reads."""


class _Stop(BaseException):
    """Everything that was asked for exists."""


def replay(node: Node, asker: Dropped, again: bool) -> bool:
    """Recomputes a region: fills its holders, and hands each region inside it its inputs.

    Random states, buffers and attributes are afterwards as they were.

    Args:
        asker: the holder that backward asks.
        again: whether it is to be recomputed once more afterwards.

    Returns:
        Whether there were holders to fill.

    Raises:
        ReplayError: the forward did not do again what it had done.
    """
    waiting = node.waiting(asker, again)
    prune = node.prunable
    with _aside(node):
        while True:
            attempt = Replay(node, waiting, prune)
            try:
                attempt.run()
                break
            except Mismatch:
                if not prune:
                    raise
                prune = node.prunable = False
                for holder in chain.from_iterable(waiting.values()):
                    holder.tensor = None
    missing = sum(h.tensor is None for holders in waiting.values() for h in holders)
    if missing:
        raise node.error(f"{missing} of {len(waiting)} saved tensors were not made again")
    verify(chain.from_iterable(waiting.values()))
    return bool(waiting)


@contextmanager
def _aside(node: Node) -> Iterator[None]:
    """Random states, buffers, attributes and the current run are restored on exit."""
    calls = [c for c in node.span.calls[node.begin : node.end] if c is not None]
    device_type = node.rewrite.device_type
    generators = tuple({g: None for c in calls for g in c.program.generators})
    # a stage may move them without drawing, so the trace does not say; a dry run moves none
    random = any(c.program.moves_random for c in calls) or not is_tracing()
    states = generator_states(random, generators, device_type)
    previous = CURRENT.run
    with ExitStack() as stack:
        stack.callback(setattr, CURRENT, "run", previous)
        stack.callback(set_generator_states, states)
        for path, name in dict.fromkeys(t for c in calls for t in c.program.touches):
            module = node.rewrite.module(path)
            if name not in module._buffers:
                had = name in module.__dict__
                stack.callback(_restore_attribute, module, name, had, module.__dict__.get(name))
            else:
                stack.callback(module._buffers.__setitem__, name, module._buffers[name])
        for path, name, _ in dict.fromkeys(b for c in calls for b in c.program.buffers):
            table = node.rewrite.module(path)._buffers
            stack.callback(table.__setitem__, name, table[name])
        yield


def _restore_attribute(module: torch.nn.Module, name: str, had: bool, value: Any) -> None:
    if had:
        module.__dict__[name] = value
    else:
        module.__dict__.pop(name, None)


class Replay:
    """One attempt. It is the current run of its thread: inner patched forwards ask it."""

    def __init__(self, node: Node, waiting: dict[int, list[Dropped]], prune: bool) -> None:
        self.node = node
        self.rewrite = node.rewrite
        self.calls: Counter[str] = Counter()
        self.waiting = waiting
        # of parameters and buffers that have changed since the forward pass, by id: as they were
        self.versions: dict[int, int] = {}
        self.remaining = len(waiting)
        self.number = 0
        self.mode = PruneMode(node) if prune else None
        self.residents = dict(node.residents)
        self.capturing: dict[int, Span] = {}
        children = ((key, ref()) for key, ref in node.children.items())
        self.uncaptured = {
            key: child for key, child in children if child is not None and child.inputs is None
        }

    def satisfied(self) -> bool:
        return not self.remaining and not self.uncaptured

    def run(self) -> None:
        CURRENT.run = self
        node, span = self.node, self.node.span
        if node.inputs is None:
            raise node.error("its inputs are gone")
        available = dict(node.inputs)
        set_generator_states(node.random)
        for position in range(node.begin, node.end):
            record = span.calls[position]
            if record is None:
                raise node.error("its arguments are gone")
            owner = node.owners[position - node.begin]
            if owner is not None:
                self._capture_split(position, available)
            if self.satisfied():
                return
            try:
                available.update(self._call(record, position, available, owner is not None))
            except _Stop:
                return
            available = {k: t for k, t in available.items() if span.last_use[k] > position}
        if not self.remaining and self.number != len(node.holders) and not self.uncaptured:
            raise node.error(f"it saved {self.number} tensors, not {len(node.holders)} as before")

    def _call(
        self,
        record: CallRecord,
        position: int,
        available: dict[Link, torch.Tensor],
        drop: bool,
    ) -> dict[Link, torch.Tensor]:
        """Runs one recorded call; returns what later calls of the span take from it."""
        changed, exchanged = self._changed(record)
        set_generator_states(record.random)
        self.calls = Counter(record.calls)
        self.rewrite.put_attributes(record.attributes)
        for path, name, _ in record.program.buffers:
            table = self.rewrite.module(path)._buffers
            buffer = record.buffers.get((path, name), table[name])
            assert buffer is not None
            clone = table[name] = buffer.detach().clone()
            storage = clone.untyped_storage()
            self.residents[storage._cdata] = storage
        with ExitStack() as stack:
            if record.subclasses:
                stack.enter_context(torch._C._EnableTorchFunction())
            for table, name, t in exchanged:
                stack.callback(table.__setitem__, name, table[name])
                table[name] = t
            args, kwargs = record.materialize(available)
            stack.enter_context(record.patched.as_training(record.training))
            stack.enter_context(torch.set_grad_enabled(record.grad))
            if record.cached is not None or is_caching():
                stack.enter_context(caching(record.cached))
            for context in autocast_contexts(record.autocast):
                stack.enter_context(context)
            stack.enter_context(saved_tensors_hooks(_drop if drop else self._fill, _never))
            if changed:
                # below what leaves out operations: those read nothing
                stack.enter_context(unread(changed, partial(self._refusal, record)))
            if self.mode is not None:
                stack.enter_context(self.mode)
            try:
                out = record.patched.run(args, kwargs)
            except (Mismatch, ReplayError, ChangedError):
                raise
            except Exception as error:
                raise self.node.error(f"{type(error).__name__}: {error}") from error
            last_use = self.node.span.last_use
            return {
                (position, leaf): t.detach()
                for leaf, t in enumerate(tensors(out))
                if last_use.get((position, leaf), -1) > position
            }

    def _changed(
        self, record: CallRecord
    ) -> tuple[list[torch.Tensor], list[tuple[dict[str, Any], str, torch.Tensor]]]:
        """Parameters and buffers that are not as they were in the call.

        Returns:
            Those that were changed in place since, which must not be read; and where others are in
            their place now (`torch.func.functional_call`), with those of the call.
        """
        changed = []
        exchanged = []
        places = record.patched.places(record.program)
        for (t, version), (table, name) in zip(record.versions, places, strict=True):
            if table[name] is not t and not _is_same_memory(table[name], t):
                exchanged.append((table, name, t))
            if t._version != version:
                changed.append(t)
                self.versions[id(t)] = version
        return changed, exchanged

    def _refusal(self, record: CallRecord, t: torch.Tensor) -> ChangedError:
        name = record.patched.name_of(t)
        return ChangedError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: {name} was at version {self.versions[id(t)]} in the forward pass "
            f"and is now at version {t._version}. Region {self.node.program.label} is "
            "recomputed from it; change parameters and buffers after backward"
        )

    # ---- hooks

    def _fill(self, tensor: torch.Tensor) -> None:
        """Pack hook: the next save of this region has been made again."""
        if is_resident(tensor, self.residents):
            return
        number, self.number = self.number, self.number + 1
        before = len(self.node.holders)
        if number >= before:
            raise self.node.error(f"it saved more than the {before} tensors of before")
        holders = self.waiting.get(number)
        if holders is None:
            return
        first = holders[0]
        if first.shape != tensor.shape or first.dtype != tensor.dtype:
            raise self.node.error(
                f"saved tensor {number} is {tuple(tensor.shape)} {tensor.dtype}, and was "
                f"{tuple(first.shape)} {first.dtype}"
            )
        for holder in holders:
            holder.fill(tensor)
        self.remaining -= 1
        if self.satisfied():
            raise _Stop

    # ---- regions inside

    def _capture_split(self, position: int, available: dict[Link, torch.Tensor]) -> None:
        """A child that begins here gets what its calls take from before it."""
        for key, child in list(self.uncaptured.items()):
            if child.span is self.node.span and child.begin == position:
                wanted: dict[Link, Any] = {}
                moves: list[str] = []
                random = False
                for n, record in enumerate(child.span.calls[child.begin : child.end], child.begin):
                    assert record is not None
                    wanted.update(record.links())
                    random = random or record.program.moves_random or n in child.span.moved
                    moves.extend(record.program.generators)
                child.inputs = {k: available[k] for k in wanted if k[0] < position}
                child.random = generator_states(random, tuple(moves), self.rewrite.device_type)
                del self.uncaptured[key]

    def call(self, patched: PlannedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A patched forward inside the region: a region of its own, which gets its arguments."""
        number = self.calls[patched.path]
        self.calls[patched.path] = number + 1
        program = self.rewrite.program.stages.get((patched.path, number))
        # deeper than the regions directly inside, or part of this very region
        if program is None or self._parent_of(program.chain[0]) != self.node.program.index:
            return patched.run(args, kwargs)
        outer = program.chain[0]
        begun = self._child_at(program.key)
        if begun is not None:
            self.capturing[outer] = begun.span
        span = self.capturing.get(outer)
        if span is None:
            with saved_tensors_hooks(_drop, _never):
                return patched.run(args, kwargs)
        position = next((i for i, c in enumerate(span.calls) if c is None), -1)
        if position >= 0:
            record = span.calls[position] = CallRecord(
                program, patched, span, position, args, kwargs, self.calls
            )
            # not read on the way here, and not to be read from here on: as of the forward pass
            record.versions = [(t, self.versions.get(id(t), v)) for t, v in record.versions]
            if position == len(span.calls) - 1:
                for key, child in list(self.uncaptured.items()):
                    if child.span is span:
                        child.inputs = {}
                        del self.uncaptured[key]
                if self.satisfied():
                    raise _Stop
        with saved_tensors_hooks(_drop, _never):
            out = patched.run(args, kwargs)
        span.enter_outputs(position, list(tensors(out)))
        return out

    def _child_at(self, key: Any) -> Node | None:
        """The region inside this one that was recorded from the stage ``key`` on."""
        return next((c for c in self.uncaptured.values() if c.key == key), None)

    def _parent_of(self, region: int) -> int:
        return self.rewrite.program.regions[region].parent


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two frozen parameters are one in memory: a k-bit layer binds its anew in forward."""
    return (
        not (a.requires_grad or b.requires_grad)
        and (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape)
        and a.layout == b.layout == torch.strided
        and (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


def _drop(tensor: torch.Tensor) -> None:
    """Pack hook of what a replay runs only for its results."""


def _never(_: Any) -> torch.Tensor:
    raise ReplayError("backward reached the graph of a recomputation, which holds no tensors")
