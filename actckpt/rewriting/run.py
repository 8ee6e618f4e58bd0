"""The forward pass of a planned model: regions open, record and close."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from actckpt.rewriting.ambient import digests, same_states, torch_states
from actckpt.rewriting.modes import CaptureMode
from actckpt.rewriting.node import Node
from actckpt.rewriting.planned_module import PlannedModule
from actckpt.rewriting.program import StageProgram
from actckpt.rewriting.record import CallRecord, Span
from actckpt.rewriting.replay import replay
from actckpt.rewriting.resaving import unpack
from actckpt.rewriting.rewrite import Rewrite
from actckpt.tracing.call import tensors

logger = logging.getLogger("actckpt")


class Run:
    """One forward pass of one root in one thread."""

    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self.calls: Counter[str] = Counter()
        self.spans: dict[int, Span] = {}
        self.nodes: dict[int, Node] = {}
        self.stack: list[Node] = []
        # where the stages of each outermost region left torch's generators: digests of the states,
        # which are 5 kB each and would be beside everything else until the forward ends
        self.streams: dict[int, tuple[bytes, ...]] = {}
        self.residents = rewrite.residents()

    def call(self, patched: PlannedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a patched forward, recorded if the plan has a region there."""
        number = self.calls[patched.path]
        self.calls[patched.path] = number + 1
        program = self.rewrite.program.stages.get((patched.path, number))
        if program is None:
            return patched.run(args, kwargs)
        node, position = self._enter(program, patched, args, kwargs)
        before = torch_states(patched.device_type)
        self.stack.append(node)
        try:
            with saved_tensors_hooks(node.packer(), unpack):
                if node.prunable and node.program.pruning and node.program.pruning.captured:
                    with CaptureMode(node, position):
                        out = patched.run(args, kwargs)
                    node.guard_captured(list(tensors(out)))
                else:
                    out = patched.run(args, kwargs)
        finally:
            self.stack.pop()
        self._note_draws(program, node.span, position, before, torch_states(patched.device_type))
        node.span.enter_outputs(position, list(tensors(out)))
        return out

    def _note_draws(
        self,
        program: StageProgram,
        span: Span,
        position: int,
        before: dict[str, torch.Tensor],
        after: dict[str, torch.Tensor],
    ) -> None:
        """Keeps the generators' states of a call that drew though the trace did not say so.

        Between tracing and this call a dropout may have been switched on, the user's code may
        have seeded or drawn, or the region may have ended early.
        """
        if same_states(after, before):
            return
        outer = program.chain[0]
        span.moved.add(position)
        if not program.random and digests(before) != self.streams.get(outer):
            span.draws.add(position)
            record = span.calls[position]
            if record is not None:
                record.random = {**(record.random or {}), **before}
        self.streams[outer] = digests(after)

    def _enter(
        self,
        program: StageProgram,
        patched: PlannedModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Node, int]:
        """Opens or continues the regions of a stage; returns the innermost and the position."""
        enclosing = self.stack[-1] if self.stack else None
        outer = program.chain[0]
        span = self.spans.get(outer)
        if span is None or not self._continues(span, program, args, kwargs):
            span = self.spans[outer] = Span()
            self.streams.pop(outer, None)
            for index in program.chain:
                self.nodes.pop(index, None)
        position = len(span.calls)
        parent = enclosing
        for depth, index in enumerate(program.chain):
            node = self.nodes.get(index)
            if node is None or node.span is not span:
                node = self.nodes[index] = Node(
                    self.rewrite.program.regions[index],
                    self.rewrite,
                    span,
                    parent,
                    program.key,
                    self.residents,
                    replay,
                    top=depth == 0 and enclosing is None,
                )
            if depth:
                assert parent is not None
                parent.owners[-1] = program.chain[depth]
            node.owners.append(None)
            node.end = position + 1
            parent = node
        if enclosing is None:
            record = CallRecord(program, patched, span, position, args, kwargs, self.calls)
            span.calls.append(record)
            top = self.nodes[outer]
            if len(program.chain) == 1:
                top.input_storages.update(
                    t.untyped_storage()._cdata
                    for t in tensors((args, kwargs))
                    if t.layout == torch.strided and span.source(t) is None
                )
        else:
            span.calls.append(None)
        return self.nodes[program.chain[-1]], position

    def _continues(
        self, span: Span, program: StageProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a stage is called with what the plan says the stages before it returned."""
        if not program.links:
            return False
        leaves = [t for t in tensors((args, kwargs)) if t.layout == torch.strided]
        for number, link in program.links.items():
            if number >= len(leaves) or span.source(leaves[number]) != link:
                self.rewrite.warn_once(
                    f"{program.key[0]} was not called with what the stage before it returned, as "
                    "it was when the plan was made: its region ends before it"
                )
                return False
        return True
